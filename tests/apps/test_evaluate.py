"""Tests of the settings of throughput on ``moe-eval``'s command line; its runs are in test_train.py."""

from __future__ import annotations

from typing import Any

import pytest

from moe_plugin.apps.evaluate import take_throughput_
from moe_plugin.apps.throughput.throughput_settings import ThroughputSettings
from moe_plugin.errors import ConfigError


class TestTakeThroughput:
    def test_nothing_said_asks_for_nothing(self) -> None:
        changes = {"ckpt_path": "last.ckpt"}
        assert take_throughput_(changes) is None
        assert changes == {"ckpt_path": "last.ckpt"}

    def test_true_takes_the_usual_numbers_and_leaves_the_run_s_own_keys(self) -> None:
        changes = {"throughput": True, "seed": 1}
        assert take_throughput_(changes) == ThroughputSettings()
        assert changes == {"seed": 1}

    def test_a_setting_alone_asks_for_it(self) -> None:
        changes: dict[str, Any] = {"throughput.sequences": [1, 8], "throughput.rounds": 2}
        assert take_throughput_(changes) == ThroughputSettings(sequences=[1, 8], rounds=2)

    def test_false_asks_for_nothing_whatever_the_settings(self) -> None:
        assert take_throughput_({"throughput": False, "throughput.length": 8}) is None

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"throughput": 3}, "'throughput' must be true or false, got 3."),
            ({"throughput.sequences": 4}, r"'throughput.sequences' must be integers >= 1 .* got 4."),
            ({"throughput.sequences": []}, r"'throughput.sequences' must be integers >= 1 .* got \[\]."),
            ({"throughput.sequences": [1, "a"]}, r"'throughput.sequences' must be an integer >= 1, got 'a'."),
            ({"throughput.sequences": [0, 2]}, r"'throughput.sequences' must be an integer >= 1, got 0."),
            ({"throughput.sequences": [4, 1]}, r"'throughput.sequences' must rise, got \[4, 1\]."),
            ({"throughput.sequences": [1, 1]}, r"'throughput.sequences' must rise, got \[1, 1\]."),
            ({"throughput.length": 0}, "'throughput.length' must be null or an integer >= 1, got 0."),
            ({"throughput.rounds": 0}, "'throughput.rounds' must be an integer >= 1, got 0."),
            ({"throughput.rounds": 1.5}, "'throughput.rounds' must be a whole number, got 1.5."),
            ({"throughput.lenght": 8}, "Did you mean 'throughput.length'?"),
        ],
    )
    def test_what_is_not_allowed_is_named(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            take_throughput_(changes)
