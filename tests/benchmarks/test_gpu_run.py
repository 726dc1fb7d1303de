from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.line import Figures, Line
from benchmarks.gpu.part_run import PartRun
from benchmarks.gpu.part_table import PARTS, Part
from benchmarks.gpu.place import Place

ROOT = Path(__file__).parents[2]
PASSED_OVER = {
    "strategies": {"single, bf16-mixed, compiled", "ddp, bf16-mixed, eager", "fsdp, bf16-mixed, eager"}
    | {"fsdp1, bf16-mixed, eager", "fsdp1, bf16-mixed, compiled"},
    "kernels": {"fused router"},
}
"""What a CPU cannot do, and what another line rehearses."""


class TestRehearsal:
    def test_every_line_of_every_part_runs(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--out", str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        log = (tmp_path / "log.txt").read_text()
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{log}"
        assert "Nothing here is a measurement" in done.stdout
        result = json.loads((tmp_path / "gpu.json").read_text())
        assert [part["part"] for part in result["parts"]] == [part.name for part in PARTS]
        for part in result["parts"]:
            states = {line["name"]: line["state"] for line in part["lines"]}
            passed_over = {name for name, state in states.items() if state == "passed over"}
            assert passed_over == PASSED_OVER.get(part["part"], set())
            assert set(states.values()) <= {"measured", "passed over"}


def measured() -> Figures:
    return {"us": 1.0}


def broken() -> Figures:
    raise RuntimeError("no kernel image")


def dying() -> Figures:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def hanging() -> Figures:
    time.sleep(600)
    return {}


def infinite() -> Figures:
    return {"us": float("inf")}


@dataclass(frozen=True)
class Troubled(Part):
    """A part whose lines are given."""

    measures: tuple[Any, ...] = ()

    def lines(self, place: Place) -> Iterator[Line]:
        for measure in self.measures:
            needs = ("no_such_package",) if measure is None else ()
            yield Line(str(getattr(measure, "__name__", None)), measure or measured, needs)


def run(tmp_path: Path, *measures: Any, seconds: float = 120.0) -> list[tuple[str, str]]:
    """Return the state and the reason of each line."""
    part = PartRun(Troubled("name", "Title", 1, measures), seconds, True, tmp_path / "log.txt")
    part.run(multiprocessing.get_context("fork"), lambda: None)
    return [(line["state"], line.get("reason", "")) for line in part.result["lines"]]


class TestTrouble:
    def test_lines_that_fail_do_not_stop_the_others(self, tmp_path: Path) -> None:
        found = run(tmp_path, broken, measured, None, dying, infinite, measured)
        assert [state for state, _ in found] == [
            *("failed", "measured", "passed over", "failed", "failed", "measured")
        ]
        reasons = [reason for _, reason in found]
        assert reasons[0] == "RuntimeError: no kernel image (exit code 1)"
        assert reasons[2] == "not installed: no_such_package"
        assert reasons[3].endswith("(exit code -9)")
        assert "figures must be finite" in reasons[4]

    def test_line_that_hangs_is_ended_and_the_next_goes_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("benchmarks.gpu.part_run.LINE_SHARE", 0.005)
        monkeypatch.setattr("benchmarks.gpu.part_run.PATIENCE", 0.0)
        found = run(tmp_path, hanging, measured, seconds=600.0)
        assert found == [("failed", "nothing was printed (it took too long)"), ("measured", "")]

    def test_what_is_left_at_the_end_of_the_time_is_not_reached(self, tmp_path: Path) -> None:
        assert [state for state, _ in run(tmp_path, hanging, measured, seconds=0.0)][1:] in (
            [],
            ["not reached"],
        )
