"""The size of one bias update."""

from __future__ import annotations

import math

from torch import Tensor

from moe_plugin.errors import ConfigError

AUTO_FRACTION = 0.05
"""`rate: auto` moves a bias by this fraction of the spread of its site's scores."""


def check_rate(rate: float | str) -> float | str:
    """Return a valid rate unchanged.

    Raises:
        ConfigError: Unless it is a finite number >= 0 or 'auto'.
    """
    if rate == "auto":
        return rate
    if isinstance(rate, (str, bool)) or not isinstance(rate, (int, float)) or not 0 <= rate < math.inf:
        raise ConfigError(f"'rate' must be a number >= 0 or 'auto', got {rate!r}.")
    return rate


def resolve_rate(rate: float | str, spread: Tensor) -> float | Tensor:
    """The rate in units of the scores.

    Args:
        rate: A number in score units (the papers' meaning), or 'auto'.
        spread: Mean over tokens of the standard deviation of a token's scores over the experts; fp32 scalar.
    """
    return spread * AUTO_FRACTION if isinstance(rate, str) else float(rate)
