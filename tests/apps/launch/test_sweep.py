"""Tests of sweeps: each job is one job, in one folder, on all its ranks; a failing one lets the others go on."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from moe_plugin.apps import train
from tests.apps.launch.small_job import NOISY, WORDS

pytestmark = pytest.mark.usefixtures("workplace")


def sweep_folder() -> Path:
    (folder,) = Path("runs/small").iterdir()
    return folder


def table() -> list[dict[str, str]]:
    with (sweep_folder() / "sweep_summary.csv").open() as file:
        return list(csv.DictReader(file))


def seen(job: Path) -> list[dict[str, Any]]:
    """Returns what each rank of a job was configured as and came to."""
    return [json.loads(path.read_text()) for path in sorted(job.glob("seen_*.json"))]


class TestGrid:
    def test_job_on_two_ranks_and_job_on_one_are_a_job_each(self) -> None:
        train.main([*WORDS, NOISY, "-m", "strategy=ddp", "strategy.devices=1,2", "seed=3"])
        folder = sweep_folder()
        assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["0", "1"]
        (alone,), (first, second) = seen(folder / "0"), seen(folder / "1")
        assert first == second
        assert (first["ranks"], first["seed"]) == (2, 3)
        assert (alone["ranks"], alone["seed"]) == (1, 3)
        rows = table()
        assert [(row["job"], row["status"], row["strategy.devices"]) for row in rows] == [
            *(("0", "finished", "1"), ("1", "finished", "2")),
        ]
        for row in rows:
            summary = json.loads((folder / row["job"] / "summary.json").read_text())
            assert float(row["val_loss"]) == summary["val_loss"]


# What optuna 2.10 imports is deprecated.
@pytest.mark.filterwarnings("ignore:.*declarative_base")
class TestOptuna:
    @pytest.mark.slow
    def test_unseeded_sampler_gives_both_ranks_the_same_values(self) -> None:
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
        train.main(
            [
                *(*WORDS, NOISY, "-m", "strategy=ddp", "hparams_search=optuna"),
                *("hydra.sweeper.n_trials=1", "hydra.sweeper.sampler.seed=null"),
                "model.optimizer.learning_rate=interval(0.0001,0.01)",
            ]
        )
        (row,) = table()
        first, second = seen(sweep_folder() / "0")
        assert first == second
        assert first["learning_rate"] == pytest.approx(float(row["model.optimizer.learning_rate"]))

    def test_failing_trial_lets_the_others_go_on(self) -> None:
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
        with pytest.raises(SystemExit, match="1"):
            train.main(
                [
                    *(*WORDS, "-m", "hparams_search=optuna", "hydra.sweeper.n_trials=3"),
                    *("hydra.sweeper.sampler.seed=0", "data.max_train_tokens=choice(64,1024)"),
                ]
            )
        rows = table()
        assert len(rows) == 3
        for row in rows:
            assert (row["status"] == "finished") == (row["data.max_train_tokens"] == "1024")
        assert len({row["status"] for row in rows}) == 2


REFUSING = "tests.apps.launch.small_job.RefusingData"


class TestFailingJob:
    def test_users_error_is_told_in_a_line_and_the_others_go_on(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit, match="1"):
            train.main([*WORDS, "-m", f"data._target_={REFUSING},moe_plugin.apps.data.CorpusDataModule"])
        first, second = table()
        assert first["status"] == "failed: 'data' must be given."
        assert first["val_loss"] == ""
        assert second["status"] == "finished"
        lines = capsys.readouterr().err.splitlines()
        assert [line.partition(":")[0] for line in lines] == ["error in job 0", "error"]
        assert lines[1] == "error: 1 of the sweep's jobs failed: 0."

    def test_other_error_lets_the_others_go_on_too(self, capsys: pytest.CaptureFixture[str]) -> None:
        targets = "tests.apps.launch.small_job.FailingData,moe_plugin.apps.data.CorpusDataModule"
        with pytest.raises(SystemExit, match="1"):
            train.main([*WORDS, "-m", f"data._target_={targets}"])
        first, second = table()
        assert first["status"] == "failed: RuntimeError('out of memory')"
        assert second["status"] == "finished"
        assert "out of memory" in capsys.readouterr().err
