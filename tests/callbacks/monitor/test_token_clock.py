from __future__ import annotations

import time

import pytest

from moe_plugin.callbacks.monitor.token_clock import TokenClock


@pytest.fixture
def now(monkeypatch):
    """A clock that a test sets, in seconds."""
    seconds = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: seconds[0])
    return seconds


class TestRate:
    def test_pauses_do_not_count_and_each_reading_starts_anew(self, now):
        clock = TokenClock()
        clock.go()
        now[0] = 2.0
        clock.pause()
        now[0] = 100.0
        clock.go()
        now[0] = 103.0
        assert clock.rate(50) == 10.0
        now[0] = 107.0
        assert clock.rate(50) == 12.5

    def test_no_time_is_zero(self, now):
        assert TokenClock().rate(50) == 0.0
