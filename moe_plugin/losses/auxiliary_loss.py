"""What an auxiliary loss is, and the form that most balancing losses share.

Shape legend: B sequences, E experts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe_plugin.losses.statistics import LoadStatistics
from moe_plugin.number_checks import check_not_negative


class AuxiliaryLoss(Protocol):
    """A loss on what routers decided, added to the cross-entropy."""

    def __call__(self, layers: Sequence[LoadStatistics]) -> Tensor:
        """Return the loss of one micro-batch: the sum over the layers, a scalar, fp32.

        A mean over tokens: its gradient has the same size whatever the accumulation and the number of ranks.
        """
        ...

    def start_window_(self) -> None:
        """Begin the micro-batches of the next optimizer step; most losses need not know."""


@dataclass(frozen=True)
class LayerLoss(AuxiliaryLoss):
    """A loss that is `coefficient` times the sum of what each layer gives.

    Attributes:
        coefficient: Weight next to the cross-entropy.
    """

    coefficient: float

    def __post_init__(self) -> None:
        """Check the coefficient."""
        check_not_negative("coefficient", self.coefficient)

    @abstractmethod
    def of_layer(self, layer: LoadStatistics) -> Tensor:
        """Return what a layer gives; a scalar, fp32."""

    def __call__(self, layers: Sequence[LoadStatistics]) -> Tensor:
        """Return the loss, see `AuxiliaryLoss`."""
        return self.coefficient * torch.stack([self.of_layer(layer) for layer in layers]).sum()


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
