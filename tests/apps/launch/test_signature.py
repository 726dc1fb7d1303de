"""Tests of checking configuration values against type hints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from moe_plugin.apps.launch.signature import check_arguments, mismatch, unknown_key
from moe_plugin.errors import ConfigError


def target(rate: float, steps: int = 1, mode: Literal["min", "max"] = "min", name: str | None = None) -> None:
    """Stands for any constructor."""


class TestMismatch:
    @pytest.mark.parametrize(
        ("value", "hint"),
        [
            (1, int),
            (1, float),
            (0.5, float),
            (None, int | None),
            ("min", Literal["min", "max"]),
            ("auto", float | Literal["auto"]),
            (True, bool),
            ("x", Any),
            ("x", object),
            ("x", Path),
            ([1], list[int] | None),
            ([1], Any),
        ],
    )
    def test_allowed_value_passes(self, value: object, hint: Any) -> None:
        assert mismatch(value, hint) is None

    @pytest.mark.parametrize(
        ("value", "hint", "allowed"),
        [
            ("abc", float, "a number"),
            (True, int, "a whole number"),
            ([1], int, "a whole number"),
            (1.5, int, "a whole number"),
            (1, bool, "true or false"),
            (None, float | int, "a number or a whole number"),
            ("mn", Literal["min", "max"], "'min' or 'max'"),
            ("x", float | Literal["auto"], "a number or 'auto'"),
            ("x", list[int] | None, "a list or null"),
        ],
    )
    def test_other_type_is_told_what_is_allowed(self, value: object, hint: Any, allowed: str) -> None:
        assert mismatch(value, hint) == allowed


class TestCheckArguments:
    def test_fitting_arguments_pass(self) -> None:
        check_arguments(target, {"_target_": "x", "rate": 1, "mode": "max"}, "rule")

    def test_wrong_type_names_full_key_and_value(self) -> None:
        with pytest.raises(ConfigError, match=r"^'rule.rate' must be a number, got 'abc'\.$"):
            check_arguments(target, {"rate": "abc"}, "rule")

    def test_unknown_name_suggests_the_nearest(self) -> None:
        with pytest.raises(
            ConfigError, match=r"'rule.step' is not a key of 'rule', got 3\. Did you mean 'rule.steps'\?"
        ):
            check_arguments(target, {"step": 3}, "rule")

    def test_target_with_keyword_arguments_takes_any_name(self) -> None:
        check_arguments(dict, {"anything": 1}, "node")


class TestUnknownKey:
    def test_top_level_key_lists_the_allowed(self) -> None:
        error = unknown_key("sed", 1, ["seed", "name"])
        assert (error.name, error.rule, error.value) == ("sed", "is not a key of the configuration", 1)
        assert error.fix == "Did you mean 'seed'? Allowed: seed, name."

    def test_key_below_what_has_no_keys_is_named_alone(self) -> None:
        assert str(unknown_key("a.b", 1, [])) == "'a.b' is not a key of 'a', got 1."
