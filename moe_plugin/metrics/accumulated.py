"""Load metrics that accumulate over batches, as torchmetrics.

Shape legend: N batches, L MoE layers, E experts (of the layer that has most).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from moe_plugin.errors import ConfigError
from moe_plugin.metrics.dead import dead_experts
from moe_plugin.metrics.entropy import load_entropy
from moe_plugin.metrics.layers import stack_layers
from moe_plugin.metrics.violation import max_violation


class LoadMetric(Metric, ABC):
    """A load metric over everything routed since the last `reset`; exact over ranks.

    `compute` gives one number over the layers, `per_layer` one for each.

    Args:
        num_experts: The number of experts of each MoE layer.
        kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ConfigError: There is no layer, or a layer without experts.
    """

    full_state_update = False
    num_experts_L: Tensor

    def __init__(self, num_experts: Sequence[int], **kwargs: Any) -> None:
        """Start without any tokens."""
        super().__init__(**kwargs)
        if not num_experts or min(num_experts) < 1:
            raise ConfigError("num_experts", "must hold at least 1 expert for each layer", list(num_experts))
        self.register_buffer("num_experts_L", torch.tensor(list(num_experts)), persistent=False)

    def update(self, tokens_per_expert: Tensor | Mapping[str, Tensor]) -> None:
        """Add the counts of a batch.

        Args:
            tokens_per_expert: Counts of routed tokens: an integer tensor (L, E), or (N, L, E) for several
                batches, with zeros past the last expert of smaller layers; or the (E,) of each layer, in order.

        Raises:
            ConfigError: The shape of the counts does not fit `num_experts`.
        """
        rectangle = (
            stack_layers(tokens_per_expert) if isinstance(tokens_per_expert, Mapping) else tokens_per_expert
        )
        shape = (len(self.num_experts_L), int(self.num_experts_L.max()))
        if rectangle.shape[-2:] != shape:
            rule = f"must have a shape that ends in (layers, experts) = {shape}"
            raise ConfigError("tokens_per_expert", rule, tuple(rectangle.shape))
        self.add_(rectangle.long().reshape(-1, *shape))

    def compute(self) -> Tensor:
        """Return the mean over the layers; a scalar."""
        return self.by_layer().mean()

    def per_layer(self) -> Tensor:
        """Return the metric of each layer, over all ranks; shape (L,)."""
        with self.sync_context(should_sync=self.sync_on_compute):
            return self.by_layer()

    @abstractmethod
    def add_(self, tokens_NLE: Tensor) -> None:
        """Add int64 counts to the state."""

    @abstractmethod
    def by_layer(self) -> Tensor:
        """Return the metric of each layer from this rank's state; shape (L,)."""


class TotalLoadMetric(LoadMetric):
    """A load metric of the summed counts; the state is int64 and sums exactly over ranks."""

    tokens_per_expert_LE: Tensor

    def __init__(self, num_experts: Sequence[int], **kwargs: Any) -> None:
        """Start without any tokens."""
        super().__init__(num_experts, **kwargs)
        zeros_LE = torch.zeros(len(num_experts), max(num_experts), dtype=torch.int64)
        self.add_state("tokens_per_expert_LE", zeros_LE, dist_reduce_fx="sum")

    def add_(self, tokens_NLE: Tensor) -> None:
        """Add int64 counts to the state."""
        self.tokens_per_expert_LE += tokens_NLE.sum(0)


class MaxViolationGlobal(TotalLoadMetric):
    """MaxVio of the counts summed over all batches; mean over layers (MaxVio_global, arXiv 2408.15664)."""

    higher_is_better = False

    def by_layer(self) -> Tensor:
        """Return MaxVio of each layer; float64 (L,)."""
        return max_violation(self.tokens_per_expert_LE, self.num_experts_L)


class LoadEntropy(TotalLoadMetric):
    """Entropy of the counts summed over all batches in nats, over `ln E`; mean over layers."""

    higher_is_better = True

    def by_layer(self) -> Tensor:
        """Return the normalised entropy of each layer; float64 (L,)."""
        return load_entropy(self.tokens_per_expert_LE, self.num_experts_L)


class DeadExperts(TotalLoadMetric):
    """Experts without a single token over all batches; the sum over layers."""

    higher_is_better = False

    def compute(self) -> Tensor:
        """Return the number of dead experts in all layers; an int64 scalar."""
        return self.by_layer().sum()

    def by_layer(self) -> Tensor:
        """Return the dead experts of each layer; int64 (L,)."""
        return dead_experts(self.tokens_per_expert_LE, self.num_experts_L)


class MaxViolationBatch(LoadMetric):
    """MaxVio of each batch, averaged over batches, mean over layers (MaxVio_batch, arXiv 2408.15664).

    A batch in which a layer saw no tokens does not count for that layer. Each rank's `update` is one batch; for the
    global batch, pass counts that are already summed over ranks.
    """

    higher_is_better = False
    violation_L: Tensor
    batches_L: Tensor

    def __init__(self, num_experts: Sequence[int], **kwargs: Any) -> None:
        """Start without any tokens."""
        super().__init__(num_experts, **kwargs)
        layers = len(num_experts)
        self.add_state("violation_L", torch.zeros(layers, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("batches_L", torch.zeros(layers, dtype=torch.int64), dist_reduce_fx="sum")

    def add_(self, tokens_NLE: Tensor) -> None:
        """Add the violation of each batch to the state."""
        self.violation_L += max_violation(tokens_NLE, self.num_experts_L).sum(0)
        self.batches_L += (tokens_NLE.sum(-1) > 0).sum(0)

    def by_layer(self) -> Tensor:
        """Return the mean MaxVio of each layer over its batches, 0 without batches; float64 (L,)."""
        return self.violation_L / self.batches_L.clamp(min=1)
