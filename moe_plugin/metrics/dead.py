"""Dead experts: those without a token.

Shape legend: L MoE layers, E experts.
"""

from __future__ import annotations

from torch import Tensor

from moe_plugin.metrics.layers import experts_per_layer


def dead_experts(tokens_per_expert: Tensor, num_experts: Tensor | None = None) -> Tensor:
    """Return the number of experts without a token in each row; int64, shape (...). See `max_violation`."""
    return experts_per_layer(tokens_per_expert, num_experts) - (tokens_per_expert > 0).sum(-1)
