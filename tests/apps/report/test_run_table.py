from __future__ import annotations

import io
import shlex

import torch
from rich.console import Console

from moe_plugin.apps.report.run_table import balance_table, headline_table, run_report, tensorboard_command
from moe_plugin.apps.report.summary import RunSummary
from moe_plugin.callbacks.load_monitor import LoadMonitor
from moe_plugin.metrics import layer_loads
from moe_plugin.types import LoadRecord

BEFORE = {"blocks.0": torch.tensor([8, 0, 0, 0]), "blocks.1": torch.tensor([4, 4, 0, 0])}
AFTER = {"blocks.0": torch.tensor([2, 2, 2, 2]), "blocks.1": torch.tensor([3, 1, 2, 2])}
SUMMARY = RunSummary(2.2, 9.0, 0.5, 0.25, 0, 12345.6, 100.5, None, 3_000_000, 1_000_000)


def shown(renderable) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(renderable)
    return console.file.getvalue()


class TestBalanceTable:
    def test_each_layer_and_the_whole_show_before_and_after(self):
        lines = shown(
            balance_table(
                layer_loads(BEFORE), layer_loads(AFTER), {"blocks.0": 0.02, "blocks.1": 0.01}, "validation"
            )
        ).splitlines()
        first, second, whole = (
            next(line for line in lines if name in line) for name in (".0 ", ".1 ", "all")
        )
        assert "3.00 → 0.00" in first
        assert "3 → 0" in first
        assert "0.0200" in first
        assert "1.00 → 0.50" in second
        assert "2.00 → 0.25" in whole
        assert "5 → 0" in whole


class TestHeadlineTable:
    def test_numbers_are_readable_and_what_is_unknown_is_a_dash(self):
        text = shown(headline_table(SUMMARY))
        assert "3,000,000" in text
        assert "12,346" in text
        assert "–" in next(line for line in text.splitlines() if "seed" in line)  # noqa: RUF001


class TestTensorboardCommand:
    def test_path_below_the_current_folder_is_relative_and_quoted(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        logs = tmp_path / "my runs" / "a"
        assert tensorboard_command(logs) == "tensorboard --logdir 'my runs/a'"

    def test_path_elsewhere_is_absolute(self, tmp_path, monkeypatch):
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        assert shlex.split(tensorboard_command(tmp_path / "logs"))[-1] == str(tmp_path / "logs")


class TestRunReport:
    def test_monitor_that_saw_a_run_is_shown(self):
        monitor = LoadMonitor()
        monitor.training.first_record = LoadRecord(1, BEFORE, {}, {})
        monitor.validation.load = layer_loads(AFTER)
        text = shown(run_report(SUMMARY, monitor))
        assert "first step → validation" in text
        assert "3.00 → 0.00" in text
        assert "perplexity" in text

    def test_monitor_that_saw_nothing_leaves_the_headline(self):
        text = shown(run_report(SUMMARY, LoadMonitor()))
        assert text == shown(headline_table(SUMMARY))
        assert "perplexity" in text
