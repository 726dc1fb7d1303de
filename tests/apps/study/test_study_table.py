from __future__ import annotations

from dataclasses import replace

import pytest

from moe_plugin.apps.study.markdown import spread
from moe_plugin.apps.study.picture import draw
from moe_plugin.apps.study.results import Result, by_arm, read_csv, write_csv
from moe_plugin.apps.study.study_table import differences, markdown

ONE = Result("mine", "a", 0, "abc", 2.0, 8.0, 0.25, 0.5, 0, 2.0, 1e6, 1000.0, 60.0)
RUNS = [
    ONE,
    replace(ONE, seed=1, perplexity=10.0),
    replace(ONE, arm="b", perplexity=8.8),
    replace(ONE, arm="b", seed=1, perplexity=9.0),
    replace(ONE, arm="c", seed=7),
]


class TestResults:
    def test_csv_gives_back_what_was_written(self, tmp_path):
        write_csv(RUNS, tmp_path / "out.csv")
        assert read_csv(tmp_path / "out.csv") == {"mine": RUNS}


class TestDifferences:
    def test_runs_are_compared_with_those_of_the_same_seed(self):
        arms = by_arm(RUNS)
        assert differences(arms["b"], arms["a"]) == pytest.approx([10.0, -10.0])

    def test_run_without_a_partner_is_left_out(self):
        assert differences(by_arm(RUNS)["c"], by_arm(RUNS)["a"]) == []


class TestMarkdown:
    def test_rows_hold_mean_spread_and_paired_difference(self):
        a, b, c = markdown(RUNS, "a").splitlines()[2:]
        assert a.startswith("| a | 2 | 9.000 ± 1.414 |  |  | 0.250 ± 0.000 |")
        assert b.startswith("| b | 2 | 8.900 ± 0.141 | +0.00 ± 14.14 | 1 of 2 |")
        assert c.startswith("| c | 1 | 8.000 |  |  |")


class TestSpread:
    def test_one_seed_has_no_deviation(self):
        assert spread([2.0]) == "2.000"
        assert spread([1.0, 3.0], 1, "+") == "+2.0 ± 1.4"


class TestDraw:
    def test_picture_has_a_panel_for_each_study(self, tmp_path):
        assert draw({"one": RUNS[:4], "two": RUNS[:4]}, tmp_path / "p.png").stat().st_size > 10_000
