"""What a rule sees.

Shape legend: E experts, G bins of a histogram of gaps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Load:
    """The load of one step over all ranks, and the bias.

    It is for one site, or for several with a leading dimension: sums and means are over the last one.

    Attributes:
        counts_E: Tokens per expert; int64 (..., E).
        bias_E: The selection bias; floating (..., E).
        shares_E: The share of the tokens that each expert should get; float64 (..., E), summing to one. None for
            equal shares.
        gaps_EG: How far scores were from being selected, see `moe_plugin.balancing.gaps`; int64 (..., E, G). None
            unless the rule sets ``needs_gaps``.
    """

    counts_E: Tensor
    bias_E: Tensor
    gaps_EG: Tensor | None = None
    shares_E: Tensor | None = None

    def of(self, site: int) -> Load:
        """Return the load of one site of several."""
        gaps_EG = None if self.gaps_EG is None else self.gaps_EG[site]
        shares_E = None if self.shares_E is None else self.shares_E[site]
        return Load(self.counts_E[site], self.bias_E[site], gaps_EG, shares_E)

    @property
    def expected_E(self) -> Tensor:  # noqa: N802 (shape suffix)
        """Tokens that each expert should get; float64 (..., E), or (..., 1) if all should get as many."""
        total_1 = self.counts_E.sum(-1, keepdim=True).double()
        return total_1 / self.counts_E.shape[-1] if self.shares_E is None else total_1 * self.shares_E

    @property
    def error_E(self) -> Tensor:  # noqa: N802 (shape suffix)
        """Share of the expected load that is missing, ``(mean - c) / mean``; float64 (..., E) with zero mean.

        With equal shares the difference is taken in integers and divided once: no count is too large for it.
        """
        if self.shares_E is not None:
            return centred(1 - self.counts_E / self.expected_E.clamp(min=torch.finfo(torch.float64).tiny))
        total_1 = self.counts_E.sum(-1, keepdim=True)
        return (total_1 - self.counts_E.shape[-1] * self.counts_E).double() / total_1.clamp(min=1).double()

    @property
    def signs_E(self) -> Tensor:  # noqa: N802 (shape suffix)
        """1 below the expected load, -1 above, 0 at it; int64 (..., E), exact where a float mean would not be."""
        if self.shares_E is not None:
            return (self.expected_E - self.counts_E).sign().long()
        return (self.counts_E.sum(-1, keepdim=True) - self.counts_E.shape[-1] * self.counts_E).sign()


def centred(values_E: Tensor) -> Tensor:
    """Return the values less their mean over the experts; float64. Integers are rounded once."""
    if values_E.dtype == torch.int64:
        num_experts = values_E.shape[-1]
        return (num_experts * values_E - values_E.sum(-1, keepdim=True)).double() / num_experts
    return values_E - values_E.mean(-1, keepdim=True)
