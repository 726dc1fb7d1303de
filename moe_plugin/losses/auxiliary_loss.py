"""What an auxiliary loss is, and the form that most balancing losses share.

Shape legend: B sequences, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from moe_plugin.losses.statistics import LoadStatistics


class AuxiliaryLoss(Protocol):
    """A loss on what routers decided, added to the cross-entropy."""

    def __call__(self, layers: Sequence[LoadStatistics]) -> Tensor:
        """Return the loss of one micro-batch: the sum over the layers, a scalar, fp32.

        A mean over tokens: its gradient has the same size whatever the accumulation and the number of ranks.
        """
        ...

    def start_window_(self) -> None:
        """Begin the micro-batches of the next optimizer step; most losses need not know."""


def load_times_probability(counts_BE: Tensor, probability_BE: Tensor) -> Tensor:
    """Return ``E * sum_e f_e * P_e``, with f_e the share of selections that went to expert e, without gradient.

    It is 1 for even loads and up to E if one expert takes all. arXiv 2101.03961, equation 4.

    Args:
        counts_BE: Selections of each expert.
        probability_BE: P_e.

    Returns:
        fp32 (B,).
    """
    share_BE = counts_BE.float() / counts_BE.sum(-1, keepdim=True).clamp(min=1)
    return share_BE.shape[-1] * (share_BE * probability_BE).sum(-1)
