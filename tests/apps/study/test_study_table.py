from __future__ import annotations

from dataclasses import replace

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

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
    def test_dots_are_the_runs_and_their_means(self, tmp_path, monkeypatch):
        drawn, save = [], Figure.savefig
        monkeypatch.setattr(
            Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))
        )
        path = draw({"one": RUNS[:4], "two": RUNS[2:4]}, tmp_path / "p.png")
        # 150 pixels an inch: 9.5 wide; 0.8 and 0.24 per arm high, with two arms and one.
        assert imread(path).shape[:2] == (round(150 * (0.8 + 2 * 0.24 + 0.8 + 0.24)), round(150 * 9.5))
        left, right, *other = drawn[0].axes
        assert [left.get_title(loc="left"), other[0].get_title(loc="left")] == ["one", "two"]
        assert [label.get_text() for label in left.get_yticklabels()] == ["a (2)", "b (2)"]
        of_a, mean_a, of_b, mean_b = (dots.get_offsets()[:, 0].tolist() for dots in right.collections)
        # Perplexities 8 and 10 of a, 8.8 and 9 of b: the seeds' means are 8.4 and 9.5.
        assert of_a == pytest.approx([100 * (8 / 8.4 - 1), 100 * (10 / 9.5 - 1)])
        assert of_b == pytest.approx([100 * (8.8 / 8.4 - 1), 100 * (9 / 9.5 - 1)])
        assert [*mean_a, *mean_b] == pytest.approx([sum(of_a) / 2, sum(of_b) / 2])
