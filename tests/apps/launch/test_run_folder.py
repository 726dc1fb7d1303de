"""Tests of the run's folder at the start of a run."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import OmegaConf

from moe_plugin.apps.launch.last_checkpoint import find_checkpoint
from moe_plugin.apps.launch.run_folder import prepare_


class TestPrepare:
    def test_earlier_result_goes_and_earlier_tables_stay(self, tmp_path: Path) -> None:
        (tmp_path / "csv").mkdir()
        for text in ("first", "second"):
            (tmp_path / "csv" / "metrics.csv").write_text(text)
            (tmp_path / "summary.json").touch()
            (tmp_path / "stopped.txt").touch()
            prepare_(tmp_path, OmegaConf.create({"seed": 1}))
        assert {path.name for path in tmp_path.iterdir()} == {"csv", "config.yaml"}
        tables = {path.name: path.read_text() for path in (tmp_path / "csv").iterdir()}
        assert tables == {"metrics.1.csv": "first", "metrics.2.csv": "second"}


class TestFindCheckpoint:
    def test_anything_but_last_is_taken_as_it_is(self, tmp_path: Path) -> None:
        torch.save({"state_dict": {}}, tmp_path / "best.ckpt")
        for path in (None, str(tmp_path / "best.ckpt")):
            assert find_checkpoint(path, tmp_path) == path

    def test_last_is_the_folders_own_and_nothing_before_there_is_one(self, tmp_path: Path) -> None:
        assert find_checkpoint("last", tmp_path) is None
        checkpoint = tmp_path / "checkpoints" / "last.ckpt"
        checkpoint.parent.mkdir()
        torch.save({"state_dict": {}}, checkpoint)
        assert find_checkpoint("last", tmp_path) == str(checkpoint)
