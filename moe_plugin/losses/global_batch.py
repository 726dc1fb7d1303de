"""Qwen's load-balancing loss over the whole batch of an optimizer step.

Shape legend: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moe_plugin.losses.auxiliary_loss import AuxiliaryLoss, load_times_probability
from moe_plugin.losses.statistics import LoadStatistics
from moe_plugin.number_checks import check_not_negative


class GlobalBatchLoss(AuxiliaryLoss):
    """`coefficient * E * sum_e f_e * P_e` with f_e of the global batch: arXiv 2501.11873, section 3.

    Counts are summed over the data-parallel ranks, in one collective for all layers, and over the micro-batches of the
    accumulation window so far, as the paper's buffer does; P_e is that of the micro-batch. Without accumulation the
    gradient is exactly that of one process with the whole batch. Validation sees its own batch only.
    """

    def __init__(self, coefficient: float, process_group: dist.ProcessGroup | None = None) -> None:
        """Start with an empty window.

        Args:
            coefficient: Weight next to the cross-entropy.
            process_group: The data-parallel ranks; None is all of them.

        Raises:
            ConfigError: The coefficient is negative, infinite or NaN.
        """
        check_not_negative("coefficient", coefficient)
        self.coefficient = coefficient
        self.process_group = process_group
        self._window: Tensor | None = None

    def start_window_(self) -> None:
        """Forget the counts of the last optimizer step."""
        self._window = None

    def __call__(self, layers: Sequence[LoadStatistics]) -> Tensor:
        """Return the loss, see `AuxiliaryLoss`. In training all ranks must call it equally often."""
        counts = torch.cat([s.counts_BE.sum(0) for s in layers])
        if torch.is_grad_enabled():
            counts = self._in_window(counts)
        by_layer = counts.split([s.counts_BE.shape[-1] for s in layers])
        losses = [
            load_times_probability(counts_E, s.probability_BE.mean(0))
            for counts_E, s in zip(by_layer, layers, strict=True)
        ]
        return self.coefficient * torch.stack(losses).sum()

    def _in_window(self, counts: Tensor) -> Tensor:
        """Return the counts of all ranks and of the window's micro-batches so far, including these."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts, group=self.process_group)
        self._window = counts if self._window is None else self._window + counts
        return self._window
