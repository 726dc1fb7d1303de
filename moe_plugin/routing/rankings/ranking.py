"""What a ranking is, and the pseudo-random numbers that several use.

Shape legend: T tokens, D model width, E experts.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Ranking(Protocol):
    """What experts are selected by instead of scores; gate weights still come from the scores."""

    def __call__(self, scores_TE: Tensor, x_TD: Tensor, *, training: bool) -> Tensor:
        """Return what to rank by, before the selection bias is added; fp32 (T, E), without gradient.

        It must be the same when a layer is recomputed.

        Args:
            scores_TE: The router's scores; fp32, without gradient.
            x_TD: The hidden states they were made from.
            training: Whether the router is being trained.
        """
        ...


def pseudo_random(seeds_T: Tensor, num_experts: int) -> Tensor:
    """Return a number for each seed and expert that looks random but is always the same; fp32 (T, E) in [0, 1).

    Args:
        seeds_T: Any integers; int64.
        num_experts: E.
    """
    experts_E = torch.arange(1, num_experts + 1, device=seeds_T.device)
    mixed_TE = _mixed(_mixed(seeds_T)[:, None] + _mixed(experts_E))
    return (mixed_TE % 2**24).float() / 2**24


def _mixed(numbers: Tensor) -> Tensor:
    """Spread integers over 31 bits, each bit depending on all: two rounds of multiply and shift."""
    for _ in range(2):
        numbers = (numbers ^ (numbers >> 16)) * 0x45D9F3B % 2**31
    return numbers ^ (numbers >> 16)
