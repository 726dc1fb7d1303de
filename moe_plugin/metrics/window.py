"""The load over a window of batches, kept on the device until it is read.

Shape legend: N batches, L MoE layers, E experts (of the layer that has most).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isnan
from statistics import fmean, pstdev

import torch
from torch import Tensor

from moe_plugin.metrics.accumulated import MaxViolationBatch, MaxViolationGlobal
from moe_plugin.metrics.dead import dead_experts
from moe_plugin.metrics.entropy import load_entropy
from moe_plugin.metrics.layers import stack_layers
from moe_plugin.metrics.oscillation import StepCorrelation
from moe_plugin.metrics.rank_groups import RANKS, rank_violation

PENDING_BATCHES = 64
"""Batches kept on the device before they move to the host in one copy."""


@dataclass(frozen=True)
class LayerLoad:
    """The load of one MoE layer over a window of batches.

    Attributes:
        max_violation_batch: MaxVio of each batch, averaged over the batches.
        max_violation_global: MaxVio of the counts summed over the batches.
        entropy: Entropy of the summed counts in nats over `ln E`: 1 is even.
        dead_experts: Experts without a token in the whole window.
        tokens_per_expert: The summed counts.
        steps: Batches in the window.
        empty_steps: Batches in which the layer saw no token.
        step_correlation: See `StepCorrelation`.
        rank_violations: By number of ranks of expert parallelism that divides E: MaxVio of each batch over the ranks,
            averaged over the batches.
    """

    max_violation_batch: float
    max_violation_global: float
    entropy: float
    dead_experts: int
    tokens_per_expert: tuple[int, ...]
    steps: int = 0
    empty_steps: int = 0
    step_correlation: float = 0.0
    rank_violations: Mapping[int, float] = field(default_factory=dict)

    @property
    def coefficient_of_variation(self) -> float:
        """Standard deviation over the experts of the summed counts, over their mean; 0 without tokens."""
        mean = fmean(self.tokens_per_expert)
        return pstdev(self.tokens_per_expert) / mean if mean else 0.0


class LoadWindow:
    """The load of each layer over a number of batches.

    Adding a batch makes one small copy on the device; the host waits for the device once in
    `PENDING_BATCHES` batches and when the load is read. The host computes in int64 and float64, so the
    numbers are the same on every kind of device.

    Args:
        num_experts: The number of experts of each layer, by name, in the order of the layers.
    """

    def __init__(self, num_experts: Mapping[str, int]) -> None:
        """Start without any batch."""
        self.num_experts = dict(num_experts)
        sizes = list(num_experts.values())
        self._batch = MaxViolationBatch(sizes, sync_on_compute=False)
        self._total = MaxViolationGlobal(sizes, sync_on_compute=False)
        self._correlation = StepCorrelation(sizes)
        self._rank_violation_RL = torch.zeros(len(RANKS), len(sizes), dtype=torch.float64)
        self._pending: list[Tensor] = []
        self.batches = 0

    def add_(self, counts: Mapping[str, Tensor]) -> None:
        """Add the tokens per expert of one batch; int64 (E,) for each layer."""
        self._pending.append(stack_layers(counts[name] for name in self.num_experts))
        self.batches += 1
        if len(self._pending) == PENDING_BATCHES:
            self._settle_()

    def add_batches_(self, tokens_NLE: Tensor) -> None:
        """Add several batches that were stacked before; int64 (N, L, E), on the host."""
        self._update_(tokens_NLE)
        self.batches += len(tokens_NLE)

    def reset_(self) -> None:
        """Start a new window."""
        self._pending.clear()
        self._batch.reset()
        self._total.reset()
        self._correlation.reset_()
        self._rank_violation_RL.zero_()
        self.batches = 0

    def layer_loads(self) -> dict[str, LayerLoad]:
        """Return the load of each layer over the window."""
        self._settle_()
        total_LE, sizes_L = self._total.tokens_per_expert_LE, self._total.num_experts_L
        measures = zip(
            self._batch.per_layer().tolist(),
            self._total.per_layer().tolist(),
            load_entropy(total_LE, sizes_L).tolist(),
            dead_experts(total_LE, sizes_L).tolist(),
            [tuple(row[:experts]) for row, experts in zip(total_LE.tolist(), sizes_L.tolist(), strict=True)],
            [self.batches] * len(self.num_experts),
            (self.batches - self._batch.batches_L).tolist(),
            self._correlation.by_layer().tolist(),
            self._rank_violations(),
            strict=True,
        )
        return dict(zip(self.num_experts, (LayerLoad(*each) for each in measures), strict=True))

    def _settle_(self) -> None:
        if self._pending:
            pending, self._pending = self._pending, []
            self._update_(torch.stack(pending).cpu())

    def _update_(self, tokens_NLE: Tensor) -> None:
        self._batch.update(tokens_NLE)
        self._total.update(tokens_NLE)
        self._correlation.add_(tokens_NLE)
        sizes = list(self.num_experts.values())
        for total_L, ranks in zip(self._rank_violation_RL, RANKS, strict=True):
            total_L += rank_violation(tokens_NLE, sizes, ranks).sum(0)

    def _rank_violations(self) -> list[dict[int, float]]:
        means_LR = (self._rank_violation_RL / self._batch.batches_L.clamp(min=1)).T.tolist()
        return [
            {ranks: mean for ranks, mean in zip(RANKS, means, strict=True) if not isnan(mean)}
            for means in means_LR
        ]


def layer_loads(counts: Mapping[str, Tensor]) -> dict[str, LayerLoad]:
    """Return the load of each layer in a single batch; int64 (E,) for each layer."""
    window = LoadWindow({name: len(tokens) for name, tokens in counts.items()})
    window.add_(counts)
    return window.layer_loads()
