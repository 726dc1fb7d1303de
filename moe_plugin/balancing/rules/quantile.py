"""Move every bias towards the one that would have balanced the last step.

Shape legend: E experts, G bins of a histogram of gaps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moe_plugin.balancing.gaps import balanced_gap
from moe_plugin.balancing.rules.load import Load, centred
from moe_plugin.balancing.rules.rule import Memory
from moe_plugin.number_checks import check_fraction


@dataclass(frozen=True)
class Quantile:
    """Quantile balancing: Kimi K3, section 4.3 (equation 14), after Jianlin Su, kexue.fm/archives/11619.

    With alpha_t the (k+1)-th largest biased score of token t, expert i is used by the tokens whose score exceeds
    ``alpha_t - b_i``. If the alphas stayed, these would be ``T k / E`` tokens with the bias::

        b*_i = -quantile_{1 - k / E}(s_ti - alpha_t),  centred over the experts
        b_i += rate * (b*_i - b_i)

    Quantiles are read from a histogram with fixed bins of the biased gaps ``s_ti + b_i - alpha_t``: they are exactly
    the same on all ranks. The bins are narrow at 0, where selection changes, in proportion to their distance from it.
    If any value in an interval is the quantile, the one nearest to the present bias is taken: a balanced load changes
    nothing.

    Attributes:
        rate: Share of the way to go in one step, 1 for all of it as in the paper; less evens out the noise of batches.
    """

    needs_gaps: ClassVar[bool] = True

    rate: float = 0.2

    def __post_init__(self) -> None:
        """Check the rate.

        Raises:
            ConfigError: If it is not between 0 and 1.
        """
        check_fraction("rate", self.rate, with_one=True)

    def step(self, load: Load, rate: float | Tensor, memory: Memory) -> Tensor:
        """Return a share of the way to the balanced bias, see `Rule.step`."""
        assert load.gaps_EG is not None, "a rule that needs gaps is given them"
        return rate * centred(-balanced_gap(load.gaps_EG, load.expected_E))
