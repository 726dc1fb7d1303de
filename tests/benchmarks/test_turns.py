from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import count

import pytest

from benchmarks.turns import Turns, take_turns


def ticking() -> Callable[[], float]:
    """A clock that moves by one second each time it is read."""
    return count().__next__


class TestTakeTurns:
    def test_sides_are_called_once_a_round_with_what_is_fresh(self) -> None:
        seen: dict[str, list[int]] = {"a": [], "b": []}
        turns = take_turns(
            {name: values.append for name, values in seen.items()},
            rounds=4,
            fresh=count().__next__,
            warm_up=2,
            clock=ticking(),
        )
        assert seen == {"a": [0, 1, 2, 3, 4, 5], "b": [0, 1, 2, 3, 4, 5]}
        assert turns.seconds == {"a": [1.0] * 4, "b": [1.0] * 4}

    def test_rehearsals_are_not_timed_and_the_same_for_all_sides(self) -> None:
        seen: dict[str, list[int]] = {"a": [], "b": []}
        turns = take_turns(
            {name: values.append for name, values in seen.items()},
            rounds=2,
            fresh=count().__next__,
            warm_up=0,
            rehearsals=2,
            clock=ticking(),
        )
        assert seen == {"a": [0, 1, 2, 3, 4, 5], "b": [0, 1, 2, 3, 4, 5]}
        assert turns.seconds == {"a": [1.0] * 2, "b": [1.0] * 2}

    def test_order_is_shuffled(self) -> None:
        order: list[str] = []
        take_turns({name: lambda _, name=name: order.append(name) for name in "ab"}, rounds=60, warm_up=0)
        firsts = Counter(order[::2])
        assert set(firsts) == {"a", "b"}

    def test_disagreement_is_an_error(self) -> None:
        sides = {"a": lambda _: 1, "b": lambda _: 2}
        with pytest.raises(ValueError, match="must agree"):
            take_turns(sides, rounds=1, agree=lambda results: len(set(results.values())) == 1)


class TestTurns:
    def test_ratio_is_that_of_pairs(self) -> None:
        turns = Turns({"ours": [1.0, 8.0, 3.0], "peer": [2.0, 8.0, 1.0]})
        row = turns.row("step", "ours", "peer", goal=0.9)
        assert row.value == 1.0
        assert row.low == 0.5
        assert row.high == 3.0
        assert row.is_met is False
        assert row.milliseconds == 3000.0

    def test_one_round_has_no_spread(self) -> None:
        assert Turns({"ours": [1.0], "peer": [2.0]}).ratio("ours", "peer") == (0.5, 0.5, 0.5)

    def test_extra_time_is_that_of_pairs(self) -> None:
        turns = Turns({"ours": [1.0, 8.0, 3.0], "peer": [2.0, 7.5, 1.0]})
        assert turns.extra_microseconds("ours", "peer") == 0.5e6
