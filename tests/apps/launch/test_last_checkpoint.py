"""Tests of which checkpoint a run continues from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from moe_plugin.apps.launch.compose import compose_jobs
from moe_plugin.apps.launch.early_checks import check_early
from moe_plugin.apps.launch.last_checkpoint import find_checkpoint
from moe_plugin.checkpoints import VerifiedCheckpointIO
from moe_plugin.errors import CheckpointError, ConfigError
from tests.checkpoints.hostile import Canary

IO = VerifiedCheckpointIO()


def save(folder: Path, *names: str) -> None:
    """Saves checkpoints, the later the newer."""
    for age, name in enumerate(names):
        IO.save_checkpoint({"state_dict": {}}, folder / "checkpoints" / name)
        os.utime(folder / "checkpoints" / name, (age, age))


class TestFindCheckpoint:
    def test_damaged_last_gives_way_to_the_newest_good_one(
        self, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        save(tmp_path, "last.ckpt", "old.ckpt", "best.ckpt", "last.ckpt")
        folder = tmp_path / "checkpoints"
        for name, next_one in (
            ("last.ckpt", "last.ckpt.previous"),
            ("last.ckpt.previous", "best.ckpt"),
            ("best.ckpt", "old.ckpt"),
        ):
            assert find_checkpoint("last", tmp_path) == str(folder / name)
            (folder / name).write_bytes(b"damaged")
            assert find_checkpoint("last", tmp_path) == str(folder / next_one)
            (*_, line) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"'{folder}/last.ckpt' is damaged")
            assert line.endswith(f"Continuing from '{folder / next_one}'.")

    def test_last_that_was_being_replaced_gives_way_to_the_one_before(
        self, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        save(tmp_path, "last.ckpt", "last.ckpt")
        (tmp_path / "checkpoints" / "last.ckpt").unlink()
        assert find_checkpoint("last", tmp_path) == str(tmp_path / "checkpoints" / "last.ckpt.previous")
        assert "last.ckpt' is missing. Continuing from" in capsys.readouterr().err

    def test_run_without_a_last_one_starts_afresh(self, tmp_path: Path) -> None:
        save(tmp_path, "best.ckpt")
        assert find_checkpoint("last", tmp_path) is None

    def test_path_that_is_damaged_is_an_error(self, tmp_path: Path) -> None:
        save(tmp_path, "best.ckpt")
        (tmp_path / "checkpoints" / "best.ckpt").write_bytes(b"damaged")
        with pytest.raises(CheckpointError, match=r"best\.ckpt' is damaged"):
            find_checkpoint(str(tmp_path / "checkpoints" / "best.ckpt"), tmp_path)

    def test_file_of_another_program_comes_with_a_note_if_it_may(
        self, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        torch.save({"state_dict": {}, "extra": Canary(tmp_path / "canary")}, tmp_path / "sent.ckpt")
        with pytest.raises(CheckpointError, match=r"os\.makedirs"):
            find_checkpoint(str(tmp_path / "sent.ckpt"), tmp_path)
        assert not (tmp_path / "canary").exists()
        assert find_checkpoint(str(tmp_path / "sent.ckpt"), tmp_path, trusted=True)
        assert "saved without a SHA-256" in capsys.readouterr().err


class TestAddress:
    def test_it_is_refused_even_if_a_folder_is_called_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("http:/host").mkdir(parents=True)
        torch.save({"state_dict": {}}, "http:/host/a.ckpt")
        (config,) = compose_jobs(["ckpt_path='http://host/a.ckpt'"], multirun=False)
        with pytest.raises(ConfigError, match=r"must be a local path, got 'http://host/a\.ckpt'.*trust=true"):
            check_early(config)
