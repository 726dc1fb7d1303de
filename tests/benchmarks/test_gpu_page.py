from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.decisions import decisions
from benchmarks.gpu.goals import WIDE, goals
from benchmarks.gpu.page import PAGE, page_of
from benchmarks.gpu.place import peak_tflops
from benchmarks.gpu.results import Results

JSON = PAGE.with_suffix(".json")
"""The run that the page is made of, once there is one."""


def run_of(part: str, figures: dict[str, dict[str, float]]) -> dict[str, Any]:
    lines = [{"name": name, "state": "measured", "figures": each} for name, each in figures.items()]
    return {
        **{"dry": False, "time": "now", "command": "it", "commit": "0", "machine": {"gpu": "NVIDIA H200"}},
        "parts": [{"part": part, "reason": "", "lines": lines}],
    }


def layer(**milliseconds: float) -> Results:
    """The layer's times by side, the same on every shape."""
    lines = {
        f"{shape}: {side.replace('_', ', ', 1) if side.startswith('ours') else side}": {"ms": each}
        for shape in (WIDE, "A", "B", "C")
        for side, each in milliseconds.items()
    }
    return Results(run_of("layer", lines))


class TestPage:
    def test_committed_page_is_what_the_code_writes(self) -> None:
        assert PAGE.read_text() == page_of(json.loads(JSON.read_text()) if JSON.exists() else None)

    def test_page_says_whether_anything_was_measured(self) -> None:
        run = run_of("layer", {"A: loop": {"ms": 1.5}})
        assert "Nothing measured yet" in page_of(None)
        assert "Nothing here is a measurement" in page_of(run | {"dry": True})
        measured = page_of(run)
        assert "NVIDIA H200" in measured
        assert "| A: loop | 1.5 |  |" in measured
        assert "not a measurement" not in measured

    def test_what_went_wrong_is_in_the_table(self) -> None:
        run = run_of("layer", {})
        run["parts"][0] |= {"reason": "out of | time", "lines": [{"name": "A", "state": "not reached"}]}
        assert "| A | not reached |" in page_of(run)
        assert "Stopped: out of \\| time" in page_of(run)


class TestGoals:
    def test_without_figures_no_goal_is_met_or_missed(self) -> None:
        assert {goal.is_met for goal in goals(Results(None))} == {None}

    def test_ratios_are_of_the_peer_over_ours(self) -> None:
        found = layer(ours_torch=2.0, grouped_mm=2.2, products=1.0)
        figures = {goal.text: (goal.figure, goal.is_met) for goal in goals(found) if goal.figure is not None}
        assert figures == {
            f"layer, {WIDE}: times as fast as `grouped_mm`": (pytest.approx(1.1), True),
            "layer, A: times as fast as `grouped_mm`": (pytest.approx(1.1), True),
            "layer, B: times as fast as `grouped_mm`": (pytest.approx(1.1), False),
            "layer, C: times as fast as `grouped_mm`": (pytest.approx(1.1), False),
            f"layer, {WIDE}: share of the rate of its products alone": (0.5, False),
        }


class TestDecisions:
    @pytest.mark.parametrize(("triton", "answer"), [(0.9, "on"), (0.99, "off"), (1.01, "off")])
    def test_triton_must_win(self, triton: float, answer: str) -> None:
        verdict = dict(decisions(layer(ours_torch=1.0, ours_triton=triton)))["Triton's permutes"]
        assert verdict.startswith(f"{answer} by default")

    def test_one_lost_shape_keeps_triton_off(self) -> None:
        lines = {f"{shape}: ours, torch": {"ms": 1.0} for shape in (WIDE, "A", "B", "C")}
        lines |= {f"{shape}: ours, triton": {"ms": 0.5} for shape in (WIDE, "A", "B")}
        verdicts = dict(decisions(Results(run_of("layer", lines))))
        assert verdicts["Triton's permutes"].startswith("off by default")

    @pytest.mark.parametrize(("milliseconds", "best"), [(0.95, "a product per expert"), (0.85, "grouped")])
    def test_waiting_must_pay(self, milliseconds: float, best: str) -> None:
        lines = {
            "B in fp32: grouped products": {"ms": milliseconds, "waits": 6},
            "B in fp32: a product per expert": {"ms": 1.0, "waits": 0},
        }
        verdicts = dict(decisions(Results(run_of("layer", lines))))
        assert verdicts["experts in fp32"].startswith(best)
        assert verdicts["experts in bf16"] == "not measured"


class TestPeak:
    @pytest.mark.parametrize(
        ("card", "peak"),
        [("NVIDIA H200", 989.0), ("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA H100 PCIe", None), ("Any", None)],
    )
    def test_unknown_card_has_none(self, card: str, peak: float | None) -> None:
        assert peak_tflops(card) == peak


class TestCommand:
    def test_folder_with_a_run_is_refused(self, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "gpu.json").write_text("{}")
        with pytest.raises(SystemExit, match="2"):
            main(["--dry", "--out", str(tmp_path)])
        assert "without a run" in capsys.readouterr().err
