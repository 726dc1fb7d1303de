"""Tests of the lock of a folder, which other processes hold."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from moe_plugin.apps.launch.folder_lock import LOCK_FILE, locked
from moe_plugin.apps.study.__main__ import main as study
from moe_plugin.errors import ConfigError
from tests.apps.launch.other_process import in_other_process

KEY = "hydra.run.dir"


class TestLocked:
    def test_second_process_is_refused_by_name_while_the_first_lives(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        with in_other_process(lambda: locked(folder, KEY)) as process:
            note = (folder / LOCK_FILE).read_text()
            with pytest.raises(ConfigError, match=f"in use; process {process} on .* uses it"):
                locked(folder, KEY).__enter__()
            assert (folder / LOCK_FILE).read_text() == note
        with locked(folder, KEY):  # the first was killed
            assert (folder / LOCK_FILE).read_text() != note

    @pytest.mark.parametrize(("held", "wanted"), [("sweep", "sweep/0"), ("sweep/0", "sweep")])
    def test_sweep_and_its_job_as_a_run_exclude_each_other(
        self, held: str, wanted: str, tmp_path: Path
    ) -> None:
        (tmp_path / wanted).mkdir(parents=True)
        (tmp_path / wanted / LOCK_FILE).touch()
        with (
            in_other_process(lambda: locked(tmp_path / held, KEY)),
            pytest.raises(ConfigError, match="in use"),
        ):
            locked(tmp_path / wanted, KEY).__enter__()

    def test_runs_of_one_folder_do_not_exclude_each_other(self, tmp_path: Path) -> None:
        with in_other_process(lambda: locked(tmp_path / "0", KEY)), locked(tmp_path / "1", KEY):
            pass

    def test_folder_that_cannot_be_made_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match=f"'{KEY}' must be a folder that can be written .*file/run"):
            locked(tmp_path / "file" / "run", KEY).__enter__()

    def test_file_system_without_locks_is_only_reported(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fail(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "lockf", fail)
        with locked(tmp_path, KEY):
            assert "not locked (No locks available)" in capsys.readouterr().err

    def test_second_study_is_refused_before_it_begins(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "demo"
        with in_other_process(lambda: locked(folder, KEY)), pytest.raises(SystemExit, match="2"):
            study(["demo", "--folder", str(tmp_path), "--csv", str(tmp_path / "study.csv")])
        assert "'--folder' must be a folder that is not in use" in capsys.readouterr().err
        assert [path.name for path in tmp_path.rglob("*")] == ["demo", LOCK_FILE]
