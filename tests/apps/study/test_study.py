"""The driver and what is measured on its runs, on trainings of a second."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_plugin.apps.data import CorpusDataModule
from moe_plugin.apps.report.summary import write_summary
from moe_plugin.apps.study import budget, difficulty, imbalance, straggler_cost
from moe_plugin.apps.study.difficulty import spearman, within_positions
from moe_plugin.apps.study.results import read_csv
from moe_plugin.apps.study.trained_run import load_run, look, runs_of
from moe_plugin.errors import ConfigError
from tests.apps.launch.small_job import WORDS, write_texts
from tests.apps.report.test_summary import SUMMARY

ROOT = Path(__file__).parents[3]
STUDY = """experiment: smoke
seeds: 1
reference: proportional
arms:
  broken: [data._target_=tests.apps.launch.small_job.FailingData, "data.source.sources={{letters: 'texts/a*.txt'}}"]
  proportional: []
  top_p: [router=top_p]
"""


def study(folder: Path) -> subprocess.CompletedProcess[str]:
    # Without their callbacks: the load has to be measured.
    changes = [
        word
        for pair in (
            ("--change", word) for word in WORDS if not word.startswith(("data.source", "callbacks="))
        )
        for word in pair
    ]
    words = [
        sys.executable,
        "-m",
        "moe_plugin.apps.study",
        "mine.yaml",
        "--folder",
        "runs",
        "--csv",
        "out.csv",
        *changes,
    ]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MOE_PLUGIN_CACHE": str(folder / "c"),
    }
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a study of which one arm fails, and what its command gave."""
    folder = tmp_path_factory.mktemp("study")
    write_texts(folder)
    sources = "data.source.sources={letters: 'texts/a*.txt', digits: 'texts/d*.txt'}"
    text = (
        STUDY.format()
        .replace("[]", f'["{sources}"]')
        .replace("[router=top_p]", f'[router=top_p, "{sources}"]')
    )
    (folder / "mine.yaml").write_text(text)
    return folder, study(folder)


class TestMain:
    def test_failing_run_is_named_and_the_others_go_on(self, place):
        folder, done = place
        assert done.returncode == 1
        assert "failed: broken, seed 0; see runs/mine/broken/seed_0/log.txt" in done.stderr
        assert "out of memory" in (folder / "runs/mine/broken/seed_0/log.txt").read_text()
        rows = read_csv(folder / "out.csv")["mine"]
        assert [row.arm for row in rows] == ["proportional", "top_p"]
        assert all(row.perplexity > 1 for row in rows)

    def test_finished_runs_are_not_trained_again(self, place):
        folder, _ = place
        before = (folder / "out.csv").read_text()
        again = study(folder)
        assert again.stdout.splitlines() == ["mine: broken, seed 0"]
        assert (folder / "out.csv").read_text() == before


class TestLook:
    def test_selections_and_losses_are_those_of_the_runs_validation(self, place, monkeypatch):
        folder, _ = place
        monkeypatch.chdir(folder)
        run = load_run(runs_of(folder / "runs/mine/proportional")[0])
        batches = list(run.data.val_dataloader())
        ids, losses_T = look(run, batches)
        row = read_csv(folder / "out.csv")["mine"][0]
        assert losses_T.mean().exp().item() == pytest.approx(row.perplexity, rel=1e-5)
        assert imbalance.over_layers(run, ids, imbalance.violation) == pytest.approx(
            row.max_violation_global, rel=1e-5
        )

    def test_folder_without_runs_is_refused(self, tmp_path):
        with pytest.raises(
            ConfigError, match=rf"'arm' must hold finished runs \(seed_0, ...\), got '{tmp_path}'"
        ):
            runs_of(tmp_path)

    def test_run_without_a_checkpoint_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match=f"'run' must have a last checkpoint, got '{tmp_path}'"):
            load_run(tmp_path)


class TestCommands:
    def test_each_prints_a_row_for_the_arm(self, place, monkeypatch, capsys):
        folder, _ = place
        monkeypatch.chdir(folder)
        imbalance.main(["runs/mine/proportional", "--batches", "2"])
        assert capsys.readouterr().out.splitlines()[2].startswith("| proportional | 1 |")
        straggler_cost.main(["runs/mine/proportional", "--tokens", "512", "--batch-tokens", "128"])
        row = capsys.readouterr().out.splitlines()[2]
        assert row.startswith("| proportional | 1 |")
        assert row.endswith("|  |  |  |  |"), "8 experts do not divide over 16 ranks"
        difficulty.main(["runs/mine/top_p", "runs/mine/proportional", "--tokens", "512"])
        assert "router | " in capsys.readouterr().out.splitlines()[2]


class TestSpearman:
    def test_equals_the_correlation_of_mean_ranks(self):
        a_T, b_T = torch.randint(0, 5, (60,)), torch.randn(60).round(decimals=1)

        def ranks(values):
            return [sum(o < v for o in values) + (sum(o == v for o in values) + 1) / 2 for v in values]

        expected = torch.corrcoef(
            torch.tensor([ranks(a_T.tolist()), ranks(b_T.tolist())], dtype=torch.float64)
        )
        assert spearman(a_T, b_T) == pytest.approx(expected[0, 1].item(), abs=1e-12)

    def test_what_follows_the_position_alone_vanishes_within_positions(self):
        position_T = torch.arange(8).repeat(200)
        noise = [torch.randn(1600, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
        a_T, b_T = (position_T * 10 + each for each in noise)
        assert spearman(a_T, b_T) > 0.95
        assert abs(within_positions(a_T, b_T, 8)) < 0.1


class TestDomainsInTurn:
    def test_domain_changes_after_the_given_steps(self, tmp_path):
        from moe_plugin.apps.data import Files
        from moe_plugin.apps.data.in_turn import DomainsInTurn

        write_texts(tmp_path)
        source = Files({"letters": "texts/a*.txt", "digits": "texts/d*.txt"}, root=str(tmp_path))
        settings = {"source": source, "context_length": 16, "batch_size": 4, "val_batch_size": 4}
        data = DomainsInTurn(
            first="letters", then="digits", change_after=3, cache=str(tmp_path / "c"), **settings
        )
        assert isinstance(data, CorpusDataModule)
        domains = [
            data.domains[place] for batch in data.train_dataloader() for place in batch["domain"].tolist()
        ]
        assert domains[:12] == ["letters"] * 12
        assert set(domains[12:]) == {"digits"}
        data.change_after = 10_000
        with pytest.raises(ConfigError, match="has no more text"):
            next(iter(data.train_dataloader()))

    def test_change_that_is_not_the_checkpoints_is_refused_on_resume(self, tmp_path):
        from moe_plugin.apps.data import Files
        from moe_plugin.apps.data.in_turn import DomainsInTurn

        write_texts(tmp_path)
        source = Files({"letters": "texts/a*.txt", "digits": "texts/d*.txt"}, root=str(tmp_path))
        settings = {"context_length": 16, "batch_size": 4, "val_batch_size": 4, "cache": str(tmp_path / "c")}
        data, other = (
            DomainsInTurn(source=source, first="letters", then="digits", change_after=steps, **settings)
            for steps in (3, 4)
        )
        next(iter(data.train_dataloader()))
        other.load_state_dict(data.state_dict())
        with pytest.raises(ConfigError, match="'data' must be the checkpoint's"):
            other.train_dataloader()


class TestBudget:
    def test_parts_are_means_of_logged_windows(self, tmp_path, capsys):
        run = tmp_path / "arm" / "seed_0"
        (run / "csv").mkdir(parents=True)
        write_summary(replace(SUMMARY, target_experts_per_token=2.0), run)
        values = [9.0, 1.0, 9.0, 3.0, 2.0, 2.2]
        rows = "".join(f"{step},{value}\n{step},\n" for step, value in enumerate(values))
        (run / "csv" / "metrics.csv").write_text("step,load/experts_per_token\n" + rows)
        budget.main([str(tmp_path)])
        row = capsys.readouterr().out.splitlines()[2]
        assert row == "| arm | 2 | 1.000 | 3.000 | 2.100 | +5.00 | +10.00 |"
