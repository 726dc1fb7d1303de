"""Checks of numbers that a user sets: each returns nothing, or raises a `ConfigError` that names the setting.

NumPy's numbers are numbers here; true, false and text are not.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, TypeGuard

from moe_plugin.errors import ConfigError


def check_integer(name: str, value: object, *, least: int = 1, or_none: bool = False) -> None:
    """Check a whole number.

    Args:
        name: The setting.
        value: What was given.
        least: The smallest number allowed.
        or_none: Whether None is allowed too.

    Raises:
        ConfigError: If it is no whole number, or smaller than `least`.
    """
    if not ((or_none and value is None) or (_is_number(value, Integral) and value >= least)):
        raise ConfigError(name, f"must be {'null or ' * or_none}an integer >= {least}", value)


def check_positive_integers(**numbers: object) -> None:
    """Check whole numbers by name.

    Raises:
        ConfigError: If one is no whole number, or smaller than 1.
    """
    for name, value in numbers.items():
        check_integer(name, value)


def check_positive(name: str, value: object, allowed: str = "a number > 0") -> None:
    """Check that a number is finite and > 0.

    Args:
        name: The setting.
        value: What was given.
        allowed: What to call the numbers that are allowed.

    Raises:
        ConfigError: If it is not.
    """
    if not (_is_number(value, Real) and 0 < value < math.inf):
        raise ConfigError(name, f"must be {allowed}", value)


def check_not_negative(name: str, value: object, allowed: str = "a number >= 0") -> None:
    """Check that a number is finite and >= 0; arguments and errors as `check_positive` has them.

    Raises:
        ConfigError: If it is not.
    """
    if not (_is_number(value, Real) and 0 <= value < math.inf):
        raise ConfigError(name, f"must be {allowed}", value)


def check_fraction(name: str, value: object, *, with_one: bool = False) -> None:
    """Check that a number is >= 0 and < 1, or also 1 `with_one`; see `check_positive`.

    Raises:
        ConfigError: If it is not.
    """
    if not (_is_number(value, Real) and (0 <= value < 1 or (with_one and value == 1))):
        raise ConfigError(
            name, "must be a number from 0 to 1" if with_one else "must be a number >= 0 and < 1", value
        )


def _is_number(value: object, kind: type) -> TypeGuard[Any]:
    return isinstance(value, kind) and not isinstance(value, bool)
