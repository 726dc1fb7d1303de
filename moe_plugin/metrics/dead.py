"""Dead experts: those that no token reached.

Shape legend: L MoE layers, E experts.
"""

from __future__ import annotations

from torch import Tensor

from moe_plugin.metrics.layers import experts_per_layer


def dead_experts(tokens_per_expert: Tensor, num_experts: Tensor | None = None) -> Tensor:
    """Return number of experts without a single token in the window the counts were taken over.

    Args:
        tokens_per_expert: Counts of routed tokens; an integer dtype, shape (..., E). Rows of layers with
            fewer than E experts end in zeros.
        num_experts: How many experts each row really has; int64, shape (...). All E if left out.

    Returns:
        Dead experts per row; int64, shape (...). In a row without tokens every expert is dead.
    """
    return experts_per_layer(tokens_per_expert, num_experts) - (tokens_per_expert > 0).sum(-1)
