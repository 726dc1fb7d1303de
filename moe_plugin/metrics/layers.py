"""Layers with different numbers of experts as one rectangle of counts.

Shape legend: L MoE layers, E experts (of the layer that has most).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad


def stack_layers(counts: Mapping[str, Tensor] | Iterable[Tensor]) -> Tensor:
    """Stack the counts of all layers; rows of layers with fewer experts end in zeros.

    Args:
        counts: Tokens per expert of each layer, (E,) each; E may differ.

    Returns:
        A copy, shape (L, E) with E of the largest layer, in the dtype of the counts.
    """
    rows = list(counts.values() if isinstance(counts, Mapping) else counts)
    width = max(len(row) for row in rows)
    return torch.stack([row if len(row) == width else pad(row, (0, width - len(row))) for row in rows])


def experts_per_layer(tokens_per_expert: Tensor, num_experts: Tensor | None) -> Tensor:
    """Return how many experts each row of a rectangle of counts really has.

    Args:
        tokens_per_expert: Counts, shape (..., E).
        num_experts: The answer if it is known; int64, shape (...) or one that broadcasts to it.

    Returns:
        int64, on the device of the counts; E for each row if `num_experts` is None.
    """
    if num_experts is None:
        return torch.full(
            tokens_per_expert.shape[:-1], tokens_per_expert.shape[-1], device=tokens_per_expert.device
        )
    return num_experts.to(tokens_per_expert.device)
