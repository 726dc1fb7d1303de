"""Load entropy: how evenly the load is spread.

Shape legend: L MoE layers, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_plugin.metrics.layers import experts_per_layer


def load_entropy(tokens_per_expert: Tensor, num_experts: Tensor | None = None) -> Tensor:
    """Return the entropy of the load in nats divided by `ln E`, the entropy of an even load.

    It is between 0 (one expert takes every token) and 1 (perfectly even). For the arguments see `max_violation`.

    Returns:
        Normalised entropy per row; float64, shape (...). It is 1 without tokens, or with a single expert.
    """
    tokens = tokens_per_expert.long()
    total = tokens.sum(-1)
    share = tokens.double() / total.clamp(min=1).double().unsqueeze(-1)
    nats = torch.special.entr(share).sum(-1)
    experts = experts_per_layer(tokens, num_experts)
    defined = (total > 0) & (experts > 1)
    return torch.where(defined, nats / experts.clamp(min=2).double().log(), 1.0).clamp(max=1.0)
