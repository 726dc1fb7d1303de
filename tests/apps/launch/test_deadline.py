"""Tests of ending a process whose main thread doesn't get there; what ends it is replaced by a note."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator

import pytest

from moe_plugin.apps.launch.deadline import Deadline


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    yield
    signal.signal(signal.SIGUSR1, before)


class TestDeadline:
    def test_process_that_makes_no_move_is_ended_by_the_signals_number(self) -> None:
        ended, numbers = threading.Event(), []
        deadline = Deadline(lambda: 0.1, lambda: 7, lambda number: (numbers.append(number), ended.set()))
        deadline.start()
        signal.raise_signal(signal.SIGUSR1)
        assert ended.wait(60)
        deadline.stop()
        assert numbers == [signal.SIGUSR1]

    def test_process_that_ends_in_time_is_left_alone(self) -> None:
        numbers: list[int] = []
        deadline = Deadline(lambda: math.inf, lambda: 7, numbers.append)
        deadline.start()
        signal.raise_signal(signal.SIGUSR1)
        deadline.stop()
        (thread,) = [each for each in threading.enumerate() if each.name == "deadline"] or [None]
        if thread:
            thread.join(60)
            assert not thread.is_alive()
        assert numbers == []

    def test_each_move_gives_it_the_whole_time_again(self) -> None:
        moves, ended = iter(range(1000)), threading.Event()
        looks: list[int] = []

        def move() -> int:
            looks.append(next(moves) if len(looks) < 4 else 4)
            return looks[-1]

        deadline = Deadline(lambda: 0.3, move, lambda _: ended.set())
        deadline.start()
        signal.raise_signal(signal.SIGUSR1)
        assert ended.wait(60)
        deadline.stop()
        assert len(looks) >= 5
