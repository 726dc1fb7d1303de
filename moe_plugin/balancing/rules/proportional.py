"""Step every bias in proportion to its load error."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_plugin.balancing.rate import check_rate
from moe_plugin.balancing.rules.load import Load, centred
from moe_plugin.balancing.rules.rule import Memory
from moe_plugin.number_checks import check_positive


@dataclass(frozen=True)
class Proportional:
    """``b_i += rate * e_i`` with the normalised error ``e_i = (mean(c) - c_i) / mean(c)``.

    The error variant of arXiv 2408.15664, section 4.3, normalised: the rate does not depend on the batch size. The
    step shrinks as the load evens out, while the sign rule continues with full steps.

    Attributes:
        rate: Step in score units for an expert without tokens, or 'auto'.
        limit: Largest error that counts, to limit the effect of one collapsed step; None for no limit.
    """

    rate: float | str = "auto"
    limit: float | None = None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: If the rate is negative or not a number, or the limit is not positive.
        """
        check_rate(self.rate)
        if self.limit is not None:
            check_positive("limit", self.limit, "a number > 0 or null")

    def step(self, load: Load, rate: float | Tensor, memory: Memory) -> Tensor:
        """Return the rate times the load error, see `Rule.step`."""
        if self.limit is None:
            return rate * load.error_E
        return rate * centred(load.error_E.clamp(-self.limit, self.limit))
