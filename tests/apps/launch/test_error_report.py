"""Tests of how a process of a run reports its error to its parent."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from moe_plugin.apps.launch.error_report import VARIABLE, report_error, reported_error


class TestReport:
    def test_parent_reads_the_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(VARIABLE, str(tmp_path / "error.json"))
        report_error("'a' is wrong")
        failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(tmp_path / "error.json"))
        assert reported_error(failure) == "'a' is wrong"

    def test_process_that_reported_nothing_gives_none(self, tmp_path: Path) -> None:
        failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(tmp_path / "error.json"))
        assert reported_error(failure) is None

    def test_without_an_agent_nothing_is_written(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(VARIABLE, raising=False)
        report_error("'a' is wrong")
