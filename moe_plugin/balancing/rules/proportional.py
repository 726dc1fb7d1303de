"""Step every bias in proportion to its load error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_plugin.balancing.rate import check_rate
from moe_plugin.errors import ConfigError


@dataclass(frozen=True)
class Proportional:
    """``b_i += rate * e_i`` with the normalised error ``e_i = (mean(c) - c_i) / mean(c)``.

    The error variant of arXiv 2408.15664, section 4.3, normalised so that the rate does not depend on the batch
    size. The step shrinks as the load evens out, where the sign rule goes on with full steps.

    Attributes:
        rate: Step in score units for an expert without tokens, or 'auto'.
        limit: Largest error that counts, so that one collapsed step cannot throw the bias; None for no limit.
    """

    rate: float | str = "auto"
    limit: float | None = None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: If the rate is negative or not a number, or the limit is not positive.
        """
        check_rate(self.rate)
        if self.limit is not None and not (
            isinstance(self.limit, (int, float)) and 0 < self.limit < math.inf
        ):
            raise ConfigError(f"'limit' must be a number > 0 or null, got {self.limit!r}.")

    def direction(self, counts_E: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Normalised load errors, see `Rule.direction`."""
        total = counts_E.sum(-1, keepdim=True)
        error_E = (total - counts_E.shape[-1] * counts_E).double() / total.clamp(min=1).double()
        if self.limit is not None:
            error_E = error_E.clamp(-self.limit, self.limit)
        return (error_E - error_E.mean(-1, keepdim=True)).to(torch.float32)
