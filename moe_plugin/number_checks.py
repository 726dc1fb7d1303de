"""Checks of numbers that a user sets."""

from __future__ import annotations

import math

from moe_plugin.errors import ConfigError


def check_positive_integers(**numbers: int) -> None:
    """Check numbers by name.

    Raises:
        ConfigError: One is smaller than 1.
    """
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f"'{name}' must be a positive integer, got {value}.")


def check_positive(name: str, value: object, allowed: str = "a number > 0") -> None:
    """Check a number.

    Raises:
        ConfigError: Unless it is finite and > 0.
    """
    _check(name, value, allowed, _is_finite(value) and value > 0)  # pyright: ignore[reportOperatorIssue]


def check_not_negative(name: str, value: object, allowed: str = "a number >= 0") -> None:
    """Check a number.

    Raises:
        ConfigError: Unless it is finite and >= 0.
    """
    _check(name, value, allowed, _is_finite(value) and value >= 0)  # pyright: ignore[reportOperatorIssue]


def check_fraction(name: str, value: object, *, with_one: bool = False) -> None:
    """Check a number.

    Raises:
        ConfigError: Unless it is >= 0 and < 1, or <= 1 with ``with_one``.
    """
    allowed = "a number from 0 to 1" if with_one else "a number >= 0 and < 1"
    inside = _is_finite(value) and 0 <= value <= 1 and (with_one or value != 1)  # pyright: ignore
    _check(name, value, allowed, inside)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check(name: str, value: object, allowed: str, is_allowed: bool) -> None:
    if not is_allowed:
        raise ConfigError(f"{name!r} must be {allowed}, got {value!r}.")
