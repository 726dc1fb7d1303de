"""Whether load swings from step to step, as it does when a bias is moved too far.

Shape legend: N batches, L MoE layers, E experts (of the layer that has most).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class StepCorrelation:
    """Correlation of each layer's load errors `load / ideal - 1` with those of the batch before, over all experts.

    Near 1 the same experts stay overloaded; near 0 only the chance of small batches is left; near -1 the experts that
    were overloaded are underloaded in the next batch: the bias overshoots.

    Args:
        num_experts: The number of experts of each layer.
    """

    def __init__(self, num_experts: Sequence[int]) -> None:
        """Start without any batch."""
        self._sizes_L1 = torch.tensor(list(num_experts)).unsqueeze(-1)
        self.reset_()

    def reset_(self) -> None:
        """Forget all batches."""
        self._last_1LE: Tensor | None = None
        self._sums_3L = torch.zeros(3, len(self._sizes_L1), dtype=torch.float64)

    def add_(self, tokens_NLE: Tensor) -> None:
        """Add batches in their order; int64 counts on the host, rows of smaller layers end in zeros."""
        errors_NLE = self._errors(tokens_NLE)
        if self._last_1LE is not None:
            errors_NLE = torch.cat([self._last_1LE, errors_NLE])
        before, after = errors_NLE[:-1], errors_NLE[1:]
        for sums_L, products in zip(
            self._sums_3L, (before * after, before.square(), after.square()), strict=True
        ):
            sums_L += products.sum((0, 2))
        self._last_1LE = errors_NLE[-1:]

    def by_layer(self) -> Tensor:
        """Return the correlation of each layer, 0 without errors or with one batch; float64 (L,)."""
        products_L, before_L, after_L = self._sums_3L
        scale_L = (before_L * after_L).sqrt()
        return torch.where(scale_L > 0, products_L / scale_L.clamp(min=1e-300), 0.0)

    def _errors(self, tokens_NLE: Tensor) -> Tensor:
        """Return load over ideal minus 1; 0 for a layer without tokens, and past its last expert."""
        total_NL1 = tokens_NLE.sum(-1, keepdim=True)
        errors_NLE = self._sizes_L1 * tokens_NLE.double() / total_NL1.clamp(min=1) - 1
        present_LE = torch.arange(tokens_NLE.shape[-1]) < self._sizes_L1
        return errors_NLE.where(present_LE & (total_NL1 > 0), 0.0)
