"""DeepSeek's loss against imbalance within single sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_plugin.losses.auxiliary_loss import AuxiliaryLoss, load_times_probability
from moe_plugin.losses.statistics import LoadStatistics
from moe_plugin.number_checks import check_not_negative


@dataclass(frozen=True)
class SequenceLoss(AuxiliaryLoss):
    """`coefficient * sum_e f_e * P_e` of each sequence, mean over sequences: DeepSeek-V3, arXiv 2412.19437.

    Equations 17 to 20, with `f_e = E / (K S) * selections of e in the sequence` and P_e the mean over its tokens of the
    normalised scores. DeepSeek-V3 adds it with a very small coefficient to the bias, which balances over batches but
    lets single sequences be uneven; with a large one it is the sequence-wise baseline of section 4.5.3.

    Attributes:
        coefficient: Weight next to the cross-entropy; DeepSeek-V3 uses 0.0001.
    """

    coefficient: float = 1e-4

    def __post_init__(self) -> None:
        """Check the coefficient.

        Raises:
            ConfigError: It is negative, infinite or NaN.
        """
        check_not_negative("coefficient", self.coefficient)

    def __call__(self, layers: Sequence[LoadStatistics]) -> Tensor:
        """Return the loss, see `AuxiliaryLoss`."""
        losses = [load_times_probability(s.counts_BE, s.probability_BE).mean() for s in layers]
        return self.coefficient * torch.stack(losses).sum()
