"""The size of one bias update."""

from __future__ import annotations

from torch import Tensor

from moe_plugin.balancing.check import check_not_negative

AUTO_FRACTION = 0.05
"""`rate: auto` moves a bias by this fraction of the spread of its site's scores."""


def check_rate(rate: float | str) -> None:
    """Check a rate.

    Raises:
        ConfigError: Unless it is a finite number >= 0 or 'auto'.
    """
    if rate != "auto":
        check_not_negative("rate", rate, "a number >= 0 or 'auto'")


def resolve_rate(rate: float | str, spread: Tensor) -> float | Tensor:
    """The rate in units of the scores.

    Args:
        rate: A number in score units (the papers' meaning), or 'auto'.
        spread: Mean over tokens of the standard deviation of a token's scores over the experts; fp32 scalar.
    """
    return spread * AUTO_FRACTION if isinstance(rate, str) else float(rate)
