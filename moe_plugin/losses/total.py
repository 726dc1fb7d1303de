"""Several auxiliary losses at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moe_plugin.losses.auxiliary_loss import AuxiliaryLoss
from moe_plugin.losses.statistics import LoadStatistics


class TotalLoss(AuxiliaryLoss):
    """The sum of losses, each with its own coefficient."""

    def __init__(self, losses: Mapping[str, AuxiliaryLoss]) -> None:
        """Take the losses by name."""
        self.losses = dict(losses)

    def start_window_(self) -> None:
        """Begin it in each of them."""
        for loss in self.losses.values():
            loss.start_window_()

    def __call__(self, layers: Sequence[LoadStatistics]) -> Tensor:
        """Return the loss, see `AuxiliaryLoss`."""
        return torch.stack([loss(layers) for loss in self.losses.values()]).sum()
