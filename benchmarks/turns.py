"""Fair timing on a shared machine: sides take turns in shuffled order, and only times of one round are compared."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.row import Row


@dataclass(frozen=True)
class Turns:
    """Seconds of every call, by side; equal indices are of one round."""

    seconds: Mapping[str, list[float]]

    def milliseconds(self, side: str) -> float:
        """Return the median time of a call."""
        return 1e3 * statistics.median(self.seconds[side])

    def extra_microseconds(self, side: str, peer: str) -> float:
        """Return the median over rounds of what a side takes more than its peer."""
        return 1e6 * statistics.median(self._pairs(lambda one, other: one - other, side, peer))

    def ratio(self, side: str, peer: str) -> tuple[float, float, float]:
        """Return the quartiles over rounds of a side's time over its peer's; one round gives three times the same."""
        ratios = self._pairs(lambda a, b: a / b, side, peer)
        low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        return low, median, high

    def row(self, name: str, side: str, peer: str, **more: Any) -> Row:
        """Return the ratio as a row; `more` are other fields of `Row`."""
        low, median, high = self.ratio(side, peer)
        milliseconds = self.milliseconds(side)
        return Row(name, median, peer, low=low, high=high, milliseconds=milliseconds, **more)

    def _pairs(self, compare: Callable[[float, float], float], side: str, peer: str) -> list[float]:
        pairs = zip(self.seconds[side], self.seconds[peer], strict=True)
        return [compare(one, other) for one, other in pairs]


def take_turns(
    sides: Mapping[str, Callable[[Any], Any]],
    rounds: int,
    *,
    fresh: Callable[[], Any] = lambda: None,
    before: Callable[[], object] = lambda: None,
    agree: Callable[[Mapping[str, Any]], bool] = lambda results: True,
    warm_up: int = 3,
    rehearsals: int = 0,
    clock: Callable[[], float] | None = None,
) -> Turns:
    """Time each side once per round.

    Process time leaves out what other processes do with the core, but adds up the threads of this one, waiting ones
    too: with several threads only wall time on an idle machine means something.

    Args:
        sides: What to time, by name; each is called with what `fresh` returned in its round.
        rounds: Rounds that count.
        fresh: Makes the input of a round, untimed.
        before: Called before each side, untimed.
        agree: Whether the results of a round, by side, are equal enough for their times to be compared.
        warm_up: Rounds before, which do not count.
        rehearsals: Untimed calls of a side before each timed one, each with its own input, the same for all sides: for
            products for which oneDNN makes kernels. It keeps 1,024 of all sides together, and without rehearsals
            a side would be timed as the others have left them.
        clock: Seconds; None is process time with one thread, and wall time with several.

    Raises:
        ValueError: The sides disagree.
    """
    clock = clock or (time.process_time if torch.get_num_threads() == 1 else time.perf_counter)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warm_up + rounds):
        *before_it, given = (fresh() for _ in range(rehearsals + 1))
        results = {}
        for name in random.sample(list(sides), len(sides)):
            before()
            for other in before_it:
                sides[name](other)
            begin = clock()
            results[name] = sides[name](given)
            if turn >= warm_up:
                seconds[name].append(clock() - begin)
        if not agree(results):
            raise ValueError(f"The sides {list(sides)} must agree before they are timed, got {results}.")
    return Turns(seconds)
