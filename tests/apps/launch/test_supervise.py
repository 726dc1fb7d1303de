"""Tests of who has failed first and who hangs; the processes are stand-ins that never run."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any

import pytest

from moe_plugin.apps.launch.processes import _cause
from moe_plugin.apps.launch.rank_state import RankState, shared_states
from moe_plugin.apps.launch.signals import STOPPED
from moe_plugin.apps.launch.supervise import Rank, Ranks


def rank_of(number: int, code: int | None = None, **state: Any) -> Rank:
    return Rank(number, SimpleNamespace(poll=lambda: code), RankState(**state))  # pyright: ignore


def ranks_of(*ranks: Rank) -> Ranks:
    group = Ranks([], [])
    group.all = list(ranks)
    return group


class TestCause:
    @pytest.mark.parametrize(
        ("codes", "times"),
        [
            ((1, -signal.SIGKILL), (1.0, 0.0)),  # a gloo error after the other was killed
            ((1, 128 + signal.SIGTERM), (1.0, 2.0)),
            ((1, STOPPED), (1.0, 2.0)),
            ((1, 1), (2.0, 1.0)),
        ],
    )
    def test_rank_that_others_missed_comes_first(
        self, codes: tuple[int, int], times: tuple[float, float]
    ) -> None:
        ranks = [
            rank_of(i, code, failed_at=time) for i, (code, time) in enumerate(zip(codes, times, strict=True))
        ]
        assert min(ranks, key=_cause).number == 1


class TestHanging:
    def test_process_whose_ticks_stop_is_found(self) -> None:
        alive, stopped = rank_of(0, ticks=1), rank_of(1, ticks=1)
        for _ in range(3):
            alive.state.ticks += 1
            alive.look(1.0)
            stopped.look(1.0)
        assert ranks_of(alive, stopped).stopped(2.0) == [stopped]

    def test_rank_behind_is_found_when_all_wait(self) -> None:
        waiting, behind = rank_of(0, moves=8), rank_of(1, moves=7)
        for _ in range(3):
            waiting.look(1.0)
            behind.look(1.0)
        assert ranks_of(waiting, behind).behind(2.0) == [behind]
        assert ranks_of(waiting, behind).behind(5.0) == []

    @pytest.mark.parametrize("state", [{"moves": 0}, {"moves": 8, "is_saving": True}])
    def test_before_the_first_step_and_while_saving_nobody_is_late(self, state: dict[str, Any]) -> None:
        rank = rank_of(0, **state)
        for _ in range(3):
            rank.look(1.0)
        assert ranks_of(rank).behind(0.5) == []


class TestRankState:
    def test_end_of_a_long_traceback_is_kept(self) -> None:
        file, (state,) = shared_states(1)
        state.keep_trace("x" * 100_000 + "the error")
        assert state.trace.endswith(b"x" + b"the error")
        file.close()
