from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_plugin.balancing.schedule import RateSchedule
from moe_plugin.errors import ConfigError


class TestRateSchedule:
    def test_default_is_constant(self):
        assert [RateSchedule()(step) for step in (1, 10, 10**9)] == [1.0, 1.0, 1.0]

    def test_warmup_rises_linearly_to_one(self):
        assert [RateSchedule(warmup_steps=4)(step) for step in range(1, 7)] == [
            0.25,
            0.5,
            0.75,
            1.0,
            1.0,
            1.0,
        ]

    def test_decay_falls_linearly_to_zero(self):
        schedule = RateSchedule(decay_start=2, decay_end=6)
        assert [schedule(step) for step in range(1, 9)] == [1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]

    def test_freeze_stops_after_its_step(self):
        assert [RateSchedule(freeze_after=2)(step) for step in range(1, 5)] == [1.0, 1.0, 0.0, 0.0]

    @given(st.integers(1, 300), st.integers(0, 100), st.integers(0, 100), st.integers(1, 100))
    def test_factor_is_always_between_zero_and_one(self, step, warmup, start, length):
        schedule = RateSchedule(warmup_steps=warmup, decay_start=start, decay_end=start + length)
        assert 0.0 <= schedule(step) <= 1.0

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"warmup_steps": -1}, r"'warmup_steps' must be an integer >= 0, got -1"),
            ({"freeze_after": 1.5}, r"'freeze_after' must be null or an integer >= 0, got 1.5"),
            ({"decay_start": 3}, r"'decay_end' must be given together with decay_start \(3\), got None"),
            ({"decay_end": 3}, r"'decay_end' must be given together with decay_start \(None\), got 3"),
            ({"decay_start": 3, "decay_end": 3}, r"'decay_end' must be > decay_start \(3\), got 3"),
        ],
    )
    def test_bad_number_is_refused(self, arguments, message):
        with pytest.raises(ConfigError, match=message):
            RateSchedule(**arguments)
