"""The loss that keeps router logits small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_plugin.losses.auxiliary_loss import AuxiliaryLoss
from moe_plugin.losses.statistics import LoadStatistics
from moe_plugin.number_checks import check_not_negative


@dataclass(frozen=True)
class RouterZLoss(AuxiliaryLoss):
    """`coefficient` times the mean over tokens of `logsumexp(logits) ** 2`: ST-MoE, arXiv 2202.08906, equation 5.

    Attributes:
        coefficient: Weight next to the cross-entropy; ST-MoE uses 0.001.
    """

    coefficient: float = 1e-3

    def __post_init__(self) -> None:
        """Check the coefficient.

        Raises:
            ConfigError: It is negative, infinite or NaN.
        """
        check_not_negative("coefficient", self.coefficient)

    def __call__(self, layers: Sequence[LoadStatistics]) -> Tensor:
        """Return the loss, see `AuxiliaryLoss`."""
        return self.coefficient * torch.stack([s.square_log_z_B.mean() for s in layers]).sum()
