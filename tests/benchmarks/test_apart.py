from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch

from benchmarks.apart import apart


def adder(number: int) -> Callable[[torch.Tensor], tuple[torch.Tensor, int]]:
    return lambda given: (given + number, os.getpid())


def busy(seconds: float) -> Callable[[object], None]:
    def run(_: object) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    return run


def broken() -> Callable[[object], None]:
    raise SystemExit("broken")


def twice(side: Callable, given: torch.Tensor) -> torch.Tensor:
    return side(side(given)[0])[0]


class TestApart:
    def test_sides_run_in_processes_of_their_own_and_count_their_time(self) -> None:
        with apart(
            {"one": partial(adder, 1), "ten": partial(adder, 10), "busy": partial(busy, 0.05)}
        ) as sides:
            results = {name: sides[name](torch.tensor([2, 3])) for name in ("one", "ten")}
            assert results["one"][0].tolist() == [3, 4]
            assert results["ten"][0].tolist() == [12, 13]
            assert len({os.getpid(), *(pid for _, pid in results.values())}) == 3
            assert sides["ten"].do(twice, torch.tensor([2])).tolist() == [22]
            assert sides["busy"].seconds == 0
            sides["busy"](None)
            sides["busy"](None)
            assert sides["busy"].seconds >= 0.1

    def test_side_that_cannot_be_built_is_an_error(self) -> None:
        with apart({"broken": broken}) as sides, pytest.raises((EOFError, ConnectionError)):
            sides["broken"](None)
