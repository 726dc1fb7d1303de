"""MaxVio: how far the most loaded expert is above the mean load.

Shape legend: L MoE layers, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_plugin.metrics.layers import experts_per_layer


def max_violation(tokens_per_expert: Tensor, num_experts: Tensor | None = None) -> Tensor:
    """Return the maximal violation of the ideal load, `(max load - mean load) / mean load`.

    arXiv 2408.15664, equation 4. It is 0 for a perfectly even load and `E - 1` when one expert takes
    every token. Numerator and denominator are computed as integers (`E * max - sum` and `sum`), so the
    result is the exact ratio rounded once to float64.

    Args:
        tokens_per_expert: Counts of routed tokens; an integer dtype, shape (..., E). Rows of layers with
            fewer than E experts end in zeros.
        num_experts: How many experts each row really has; int64, shape (...). E if left out.

    Returns:
        MaxVio per row; float64, shape (...). It is 0 without tokens.
    """
    tokens = tokens_per_expert.long()
    total = tokens.sum(-1)
    excess = experts_per_layer(tokens, num_experts) * tokens.amax(-1) - total
    return torch.where(total > 0, excess.double() / total.clamp(min=1).double(), 0.0)
