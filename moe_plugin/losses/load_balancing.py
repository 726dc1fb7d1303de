"""The load-balancing loss of Switch Transformers and GShard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_plugin.losses.auxiliary_loss import AuxiliaryLoss, load_times_probability
from moe_plugin.losses.statistics import LoadStatistics
from moe_plugin.number_checks import check_not_negative


@dataclass(frozen=True)
class LoadBalancingLoss(AuxiliaryLoss):
    """`coefficient * E * sum_e f_e * P_e` for each layer: arXiv 2101.03961, equations 4 to 6.

    f_e is the share of the micro-batch's T * K selections that went to expert e, without gradient, and P_e the mean
    over its tokens of the router's probability for e. Balanced routing gives `coefficient`, all tokens on one expert up
    to `coefficient * E`. Over several layers the losses are added, as Switch does.

    Attributes:
        coefficient: Weight next to the cross-entropy; Switch uses 0.01.
    """

    coefficient: float

    def __post_init__(self) -> None:
        """Check the coefficient.

        Raises:
            ConfigError: It is negative, infinite or NaN.
        """
        check_not_negative("coefficient", self.coefficient)

    def __call__(self, layers: Sequence[LoadStatistics]) -> Tensor:
        """Return the loss, see `AuxiliaryLoss`."""
        losses = [load_times_probability(s.counts_BE.sum(0), s.probability_BE.mean(0)) for s in layers]
        return self.coefficient * torch.stack(losses).sum()
