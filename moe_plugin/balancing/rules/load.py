"""What a rule may look at.

Shape legend: E experts, G bins of a histogram of gaps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Load:
    """The load of one site in one step over all ranks, and where its bias stands.

    Attributes:
        counts_E: Tokens per expert; int64 (..., E).
        bias_E: The selection bias; floating (..., E).
        gaps_EG: How far scores were from being selected, see `moe_plugin.balancing.gaps`; int64 (..., E, G). None
            unless the rule sets ``needs_gaps``.
    """

    counts_E: Tensor
    bias_E: Tensor
    gaps_EG: Tensor | None = None

    @property
    def mean_1(self) -> Tensor:
        """Tokens per expert if all were loaded alike; float64 (..., 1)."""
        return self.counts_E.sum(-1, keepdim=True).double() / self.counts_E.shape[-1]

    @property
    def error_E(self) -> Tensor:  # noqa: N802 (shape suffix)
        """How much of the mean load is missing, ``(mean - c) / mean``; float64 (..., E), at most 1, with zero mean.

        The difference is taken in integers and divided once: no count is too large for it.
        """
        total_1 = self.counts_E.sum(-1, keepdim=True)
        return (total_1 - self.counts_E.shape[-1] * self.counts_E).double() / total_1.clamp(min=1).double()

    @property
    def signs_E(self) -> Tensor:  # noqa: N802 (shape suffix)
        """1 below the mean load, -1 above, 0 at it; int64 (..., E), exact where a float mean would not be."""
        return (self.counts_E.sum(-1, keepdim=True) - self.counts_E.shape[-1] * self.counts_E).sign()


def centred(values_E: Tensor) -> Tensor:
    """The values less their mean over the experts; float64. That of integers is rounded once."""
    if values_E.dtype == torch.int64:
        num_experts = values_E.shape[-1]
        return (num_experts * values_E - values_E.sum(-1, keepdim=True)).double() / num_experts
    return values_E - values_E.mean(-1, keepdim=True)
