from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_plugin.errors import ConfigError
from moe_plugin.number_checks import (
    check_fraction,
    check_integer,
    check_not_negative,
    check_positive,
    check_positive_integers,
)

NO_NUMBERS = ("x", "3", None, True, False, [1], 1j)
NO_INTEGERS = (*NO_NUMBERS, 1.5, 2.0, math.nan, math.inf, np.float64(2), Decimal(2))


def passes(check: Callable[..., None], *args: object, **kwargs: object) -> bool:
    try:
        check("n", *args, **kwargs)
    except ConfigError as error:
        return error.name != "n"
    return True


class TestCheckInteger:
    @pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
    def test_what_is_no_integer_is_refused(self, value: object) -> None:
        assert not passes(check_integer, value)

    @given(st.integers(), st.integers(-3, 3))
    def test_integers_from_the_least_on_pass(self, value: int, least: int) -> None:
        assert passes(check_integer, value, least=least) == (value >= least)

    def test_numpy_integers_pass(self) -> None:
        check_integer("n", np.int64(3))

    def test_none_passes_where_it_is_allowed(self) -> None:
        check_integer("n", None, or_none=True)
        with pytest.raises(ConfigError, match=r"'n' must be null or an integer >= 0, got -1\."):
            check_integer("n", -1, least=0, or_none=True)


class TestCheckPositiveIntegers:
    def test_error_names_the_one_that_is_wrong(self) -> None:
        with pytest.raises(ConfigError, match=r"'top_k' must be an integer >= 1, got 1\.5\."):
            check_positive_integers(num_experts=8, top_k=1.5)


class TestNumbers:
    @pytest.mark.parametrize("check", [check_positive, check_not_negative, check_fraction])
    @pytest.mark.parametrize("value", [*NO_NUMBERS, math.nan, math.inf, -math.inf], ids=repr)
    def test_what_is_no_finite_number_is_refused(self, check: Callable[..., None], value: object) -> None:
        assert not passes(check, value)

    @given(st.floats(allow_nan=False, allow_infinity=False))
    def test_bounds_hold_for_every_finite_number(self, value: float) -> None:
        assert passes(check_positive, value) == (value > 0)
        assert passes(check_not_negative, value) == (value >= 0)
        assert passes(check_fraction, value) == (0 <= value < 1)
        assert passes(check_fraction, value, with_one=True) == (0 <= value <= 1)

    def test_message_names_the_numbers_that_are_allowed(self) -> None:
        with pytest.raises(ConfigError, match=r"'rate' must be a number >= 0 or 'auto', got 'fast'\."):
            check_not_negative("rate", "fast", "a number >= 0 or 'auto'")
