from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest
from rich.console import Console

from moe_plugin.apps.report.stopped import write_stopped
from moe_plugin.apps.report.summary import RunSummary, write_summary
from moe_plugin.apps.report.sweep import gather_sweep, sweep_table, write_sweep_summary
from moe_plugin.errors import ConfigError

SUMMARY = RunSummary(2.2, 9.0, 0.5, 0.25, 0, 12345.6, 100.5, 0, 3_000_000, 1_000_000)


def job(folder, name: str, overrides: list[str], **measures) -> None:
    path = folder / name
    (path / ".hydra").mkdir(parents=True)
    (path / ".hydra" / "overrides.yaml").write_text("".join(f"- {line}\n" for line in overrides))
    write_summary(replace(SUMMARY, **measures), path)


@pytest.fixture
def sweep(tmp_path):
    job(tmp_path, "10", ["rule.rate=0.1", "+extra=x"], val_loss=2.1, tokens_per_second=1.0)
    job(tmp_path, "2", ["rule.rate=0.01", "seed=3"], val_loss=2.0, tokens_per_second=2.0, seed=3)
    job(tmp_path, "0", ["rule.rate=auto"], val_loss=None, tokens_per_second=3.0)
    (tmp_path / "1").mkdir()
    return tmp_path


class TestGatherSweep:
    def test_finished_jobs_come_in_order_with_overrides_as_columns(self, sweep):
        rows = gather_sweep(sweep)
        assert [row["job"] for row in rows] == ["0", "2", "10"]
        assert [row["rule.rate"] for row in rows] == ["auto", "0.01", "0.1"]
        assert [row["extra"] for row in rows] == [None, None, "x"]
        assert [row["seed"] for row in rows] == [0, 3, 0]
        assert list(rows[0])[:5] == ["job", "status", "rule.rate", "extra", "val_loss"]

    def test_job_that_was_stopped_has_a_row_that_says_why_and_no_measures(self, sweep):
        write_stopped(sweep / "1", "failed: out of memory")
        row = gather_sweep(sweep)[1]
        assert (row["job"], row["status"], row["val_loss"]) == ("1", "failed: out of memory", None)


class TestWriteSweepSummary:
    def test_file_has_a_line_for_each_finished_job(self, sweep):
        with write_sweep_summary(sweep).open() as file:
            rows = list(csv.DictReader(file))
        assert [row["val_loss"] for row in rows] == ["", "2.0", "2.1"]

    def test_later_job_is_added_and_the_columns_stay(self, sweep):
        before = write_sweep_summary(sweep).read_text().splitlines()
        job(sweep, "11", ["rule.rate=1"])
        after = write_sweep_summary(sweep).read_text().splitlines()
        assert after[: len(before)] == before
        assert len(after) == len(before) + 1

    def test_no_finished_job_writes_nothing(self, tmp_path):
        assert write_sweep_summary(tmp_path) is None
        assert list(tmp_path.iterdir()) == []


class TestSweepTable:
    @pytest.mark.parametrize(
        ("metric", "order"), [("val_loss", ["2", "10", "0"]), ("tokens_per_second", ["0", "2", "10"])]
    )
    def test_best_job_comes_first_and_unknown_last(self, sweep, metric, order):
        assert [str(cell) for cell in sweep_table(sweep, metric).columns[0].cells] == order

    def test_table_shows_overrides_and_measures(self, sweep):
        console = Console(file=io.StringIO(), width=200)
        console.print(sweep_table(sweep))
        assert "rule.rate" in console.file.getvalue()
        assert "max_violation_global" in console.file.getvalue()

    def test_table_leaves_out_what_is_the_same_for_all_jobs(self, tmp_path):
        for seed in (1, 2):
            job(tmp_path, str(seed), ["name=x", f"seed={seed}", "model.dim=8", f"rule.rate={seed}"])
        headings = [str(column.header) for column in sweep_table(tmp_path).columns]
        assert "rule.rate" in headings
        assert not {"name", "model.dim"} & set(headings)

    def test_unknown_metric_is_refused(self, sweep):
        with pytest.raises(ConfigError, match=r"'metric' must be one of val_loss, .*, got 'loss'"):
            sweep_table(sweep, "loss")


class TestQuotes:
    def test_option_that_looks_like_a_number_loses_its_quotes(self, tmp_path):
        job(tmp_path, "0", ["'experts=\"8\"'"])
        assert gather_sweep(tmp_path)[0]["experts"] == "8"
