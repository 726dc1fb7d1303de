from __future__ import annotations

import csv

import pytest

from moe_plugin import compare
from moe_plugin.compare import ARMS, Arm, collect, folder_of, main, spread, write_csv
from moe_plugin.report.summary import RunSummary, write_summary


def summary(seed, perplexity):
    return RunSummary(1.0, perplexity, 0.5, 0.25, 0, 1000.0, 60.0, seed, 10, 5)


@pytest.fixture
def trainings(monkeypatch):
    """Stands in for the trainings: records them and leaves a summary of its seed."""
    done = []

    def train(arm, seed, folder, overrides):
        target = folder_of(arm, seed, folder)
        if not (target / "summary.json").exists():
            done.append((arm.name, seed, tuple(overrides)))
            target.mkdir(parents=True)
            write_summary(summary(seed, 9.0 + seed), target)

    monkeypatch.setattr(compare, "run", train)
    return done


class TestCompare:
    def test_every_arm_runs_with_every_seed_and_lands_in_the_csv(self, trainings, tmp_path, capsys):
        main(["--seeds", "2", "--folder", str(tmp_path), "trainer.max_steps=3"])
        assert trainings == [(arm.name, seed, ("trainer.max_steps=3",)) for seed in range(2) for arm in ARMS]
        rows = list(csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines()))
        assert [(row["arm"], row["seed"]) for row in rows] == [
            (arm.name, seed) for arm in ARMS for seed in "01"
        ]
        assert "9.500 ± 0.707" in capsys.readouterr().out

    def test_interrupted_comparison_goes_on_where_it_stopped(self, trainings, tmp_path):
        target = folder_of(ARMS[0], 0, tmp_path)
        target.mkdir(parents=True)
        write_summary(summary(0, 5.0), target)
        main(["--seeds", "1", "--folder", str(tmp_path)])
        assert [name for name, *_ in trainings] == [arm.name for arm in ARMS[1:]]
        assert collect(ARMS[0], 1, tmp_path)[0].perplexity == 5.0

    def test_one_seed_has_no_spread(self):
        assert spread([2.0]) == "2.000"
        assert spread([1.0, 3.0]) == "2.000 ± 1.414"

    def test_finished_run_is_not_trained_again(self, tmp_path):
        arm = Arm("none", ())
        target = folder_of(arm, 0, tmp_path)
        target.mkdir(parents=True)
        write_summary(summary(0, 5.0), target)
        compare.run(arm, 0, tmp_path, ["no.such.key=1"])
        write_csv({"none": collect(arm, 1, tmp_path)}, tmp_path / "out.csv")
        assert (tmp_path / "out.csv").read_text().splitlines()[1].startswith("none,0,5.0")
