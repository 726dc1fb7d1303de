"""Tests of what is reported of a failing disk, and what is not."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from traceback import StackSummary

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from moe_plugin.apps.launch.disk_errors import DiskErrors
from moe_plugin.errors import RunError

FULL = OSError(errno.ENOSPC, "No space left on device")


class TestDiskErrors:
    def test_line_has_the_reason_and_the_place(self, tmp_path: Path) -> None:
        with pytest.raises(RunError) as raised, DiskErrors(tmp_path):
            raise FULL
        assert str(raised.value) == f"No space left on device: {tmp_path}. No checkpoint is left."

    def test_line_has_the_checkpoint_that_is_left(self, tmp_path: Path) -> None:
        last = tmp_path / "checkpoints" / "last.ckpt"
        last.parent.mkdir()
        last.touch()
        with pytest.raises(RunError) as raised, DiskErrors(tmp_path):
            (tmp_path / "csv" / "metrics.csv").open()
        gone = f"No such file or directory: {tmp_path}/csv/metrics.csv"
        assert str(raised.value) == f"{gone}. {last} is left to continue from."

    def test_error_behind_others_is_found(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="No space left"), DiskErrors(tmp_path):
            raise ValueError("you tried to log 1.0 which is not supported") from FULL

    def test_error_of_another_rank_is_found(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="No space left"), DiskErrors(tmp_path):
            raise CheckpointException("save", {1: (FULL, StackSummary())})

    def test_error_of_a_thread_ends_the_block_without_a_trace(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def write() -> None:
            raise FULL

        def run() -> None:
            thread = threading.Thread(target=write)
            thread.start()
            thread.join()

        with pytest.raises(RunError, match="No space left"), DiskErrors(tmp_path):
            run()
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "no", "/elsewhere"), ValueError("x")])
    def test_other_errors_pass(self, error: Exception, tmp_path: Path) -> None:
        with pytest.raises(type(error)) as raised, DiskErrors(tmp_path):
            raise error
        assert raised.value is error
