"""Tests of how often ranks agree, on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from moe_plugin.apps.launch import agreement_interval
from moe_plugin.apps.launch.agreement_interval import AgreementInterval


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(agreement_interval, "time", clock)
    return clock


def agreements(clock: Clock, interval: AgreementInterval, seconds: Sequence[float]) -> list[int]:
    """On which of the occasions, which take so long each, ranks agree."""
    due = []
    for occasion, duration in enumerate(seconds):
        clock.now += duration
        if interval.is_due():
            due.append(occasion)
            interval.agreed(interval.proposal())
    return due


class TestPace:
    def test_long_occasions_are_all_due(self, clock: Clock) -> None:
        assert agreements(clock, AgreementInterval(), [2.0] * 5) == [0, 1, 2, 3, 4]

    def test_short_occasions_are_due_ever_less_often_up_to_once_a_second(self, clock: Clock) -> None:
        due = agreements(clock, AgreementInterval(), [0.125] * 40)
        assert due == [0, 2, 6, 14, 22, 30, 38]

    def test_slower_occasions_are_due_more_often_again(self, clock: Clock) -> None:
        interval = AgreementInterval()
        agreements(clock, interval, [0.125] * 15)
        assert agreements(clock, interval, [0.5] * 12) == [7, 9, 11]

    def test_other_ranks_smaller_number_holds(self, clock: Clock) -> None:
        interval = AgreementInterval()
        assert interval.is_due()
        interval.agreed(3)
        assert [interval.is_due() for _ in range(3)] == [False, False, True]

    def test_starting_anew_makes_the_next_occasion_due(self, clock: Clock) -> None:
        interval = AgreementInterval()
        agreements(clock, interval, [0.125] * 20)
        interval.start()
        assert interval.is_due()
