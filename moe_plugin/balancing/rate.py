"""The size of one bias update."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from moe_plugin.number_checks import check_not_negative

if TYPE_CHECKING:
    from moe_plugin.balancing.rules.rule import Rule

AUTO_FRACTION = 0.05
"""`rate: auto` is this fraction of the spread of a site's scores, unless the rule has an `auto_fraction`."""


def check_rate(rate: float | str) -> None:
    """Check a rate.

    Raises:
        ConfigError: Unless it is a finite number >= 0 or 'auto'.
    """
    if rate != "auto":
        check_not_negative("rate", rate, "a number >= 0 or 'auto'")


def resolve_rate(rule: Rule, spread: Tensor) -> float | Tensor:
    """Return the rate of a rule in units of the scores.

    Args:
        rule: Its rate is a number in score units (the papers' meaning), or 'auto'.
        spread: Mean over tokens of the standard deviation of a token's scores over the experts; fp32,
            a scalar or (L, 1) for several sites.
    """
    if isinstance(rule.rate, str):
        return spread * getattr(rule, "auto_fraction", AUTO_FRACTION)
    return float(rule.rate)
