from __future__ import annotations

import errno
import os

import pytest

from moe_plugin.apps.report.atomic_write import write_atomically


class TestWriteAtomically:
    def test_failed_write_leaves_the_old_file_and_nothing_else(self, tmp_path, monkeypatch):
        def fail(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        write_atomically(tmp_path / "file", "old")
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            write_atomically(tmp_path / "file", "new")
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "old"}

    def test_file_is_as_readable_as_others(self, tmp_path):
        (tmp_path / "plain").touch()
        write_atomically(tmp_path / "file", "new")
        assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
