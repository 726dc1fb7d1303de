from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import lightning
import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from moe_plugin.checkpoints import VerifiedCheckpointIO
from moe_plugin.checkpoints.manifest import file_sum
from moe_plugin.checkpoints.replace import put
from moe_plugin.checkpoints.temporary import remove_leftovers, temporary_file, temporary_folder
from moe_plugin.checkpoints.verified_io import is_remote
from moe_plugin.errors import CheckpointError
from tests.checkpoints.hostile import Canary, save_folder, state
from tests.hosts import Host
from tests.sharding.ranks import loader
from tests.sharding.test_shard import HostProject

IO = VerifiedCheckpointIO()
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class TestSave:
    def test_checkpoint_is_the_one_that_lightning_saves(self, tmp_path):
        IO.save_checkpoint(state(1), tmp_path / "new" / "a.ckpt")
        TorchCheckpointIO().save_checkpoint(state(1), tmp_path / "b.ckpt")
        loaded, reference = IO.load_checkpoint(tmp_path / "new" / "a.ckpt"), torch.load(tmp_path / "b.ckpt")
        assert torch.equal(loaded.pop("state_dict")["a"], reference.pop("state_dict")["a"])
        assert loaded["global_step"] == reference["global_step"]

    def test_sums_are_those_of_sha256sum(self, tmp_path):
        IO.save_checkpoint(state(1), tmp_path / "a.ckpt")
        subprocess.run(["sha256sum", "-c", "--strict", "a.ckpt.sha256"], cwd=tmp_path, check=True)

    def test_only_of_last_the_one_before_is_kept(self, tmp_path):
        for step in (1, 2, 3):
            for name in ("last.ckpt", "best.ckpt"):
                IO.save_checkpoint(state(step), tmp_path / name)
        files = ("best.ckpt", "last.ckpt", "last.ckpt.previous")
        assert names(tmp_path) == sorted([*files, *(f"{name}.sha256" for name in files)])
        steps = {name: IO.load_checkpoint(tmp_path / name)["global_step"] for name in files}
        assert steps == {"best.ckpt": 3, "last.ckpt": 3, "last.ckpt.previous": 2}

    def test_file_system_without_links_keeps_it_too(self, tmp_path, monkeypatch):
        def refuse(*args):
            raise PermissionError

        monkeypatch.setattr(os, "link", refuse)
        for step in (1, 2):
            IO.save_checkpoint(state(step), tmp_path / "last.ckpt")
        assert IO.load_checkpoint(tmp_path / "last.ckpt.previous")["global_step"] == 1

    @pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
    def test_file_takes_the_place_of_a_folder(self, name, tmp_path):
        save_folder(tmp_path / name, state(1))
        IO.save_checkpoint(state(2), tmp_path / name)
        assert IO.load_checkpoint(tmp_path / name)["global_step"] == 2
        assert (tmp_path / f"{name}.previous").is_dir() == (name == "last.ckpt")

    def test_bytes_that_come_back_changed_are_no_checkpoint(self, tmp_path, monkeypatch):
        IO.save_checkpoint(state(1), tmp_path / "last.ckpt")
        monkeypatch.setattr("moe_plugin.checkpoints.verified_io.file_sum", lambda path: "0" * 64)
        with pytest.raises(
            CheckpointError, match=r"last\.ckpt.* was not written: the disk returns other bytes"
        ):
            IO.save_checkpoint(state(2), tmp_path / "last.ckpt")
        assert names(tmp_path) == ["last.ckpt", "last.ckpt.sha256"]
        assert IO.load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 1

    def test_options_of_a_storage_are_refused(self, tmp_path):
        with pytest.raises(TypeError, match="storage_options"):
            IO.save_checkpoint(state(1), tmp_path / "a.ckpt", storage_options={})

    @pytest.mark.parametrize("step", range(1, 13))
    def test_interruption_after_any_change_leaves_a_good_one(self, step, tmp_path, monkeypatch):
        """Each change of a name in the folder is in turn the last that happens."""
        left = step

        def count(change):
            def counted(*args, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
                return change(*args, **kwargs)

            return counted

        last = tmp_path / "last.ckpt"
        for number in (1, 2):
            IO.save_checkpoint(state(number), last)
        torch.save(state(3), tmp_path / "new")
        sums = [("new", file_sum(tmp_path / "new"))]
        with monkeypatch.context() as patch:
            for owner, name in ((os, "replace"), (os, "link"), (Path, "replace"), (Path, "unlink")):
                patch.setattr(owner, name, count(getattr(owner, name)))
            try:
                put(tmp_path / "new", last, sums)
            except KeyboardInterrupt:
                left = 0
        assert IO.load_checkpoint(last)["global_step"] in (2, 3)


class TestLoad:
    def test_copy_under_another_name_is_verified(self, tmp_path):
        IO.save_checkpoint(state(1), tmp_path / "a.ckpt")
        for end in ("", ".sha256"):
            (tmp_path / f"a.ckpt{end}").rename(tmp_path / f"b.ckpt{end}")
        assert IO.load_checkpoint(tmp_path / "b.ckpt")["global_step"] == 1
        with (tmp_path / "b.ckpt").open("ab") as file:
            file.write(b"x")
        with pytest.raises(
            CheckpointError, match=r"b\.ckpt' is damaged: its SHA-256 is not .*b\.ckpt\.sha256'"
        ):
            IO.load_checkpoint(tmp_path / "b.ckpt")

    def test_link_is_verified_by_the_sums_of_its_target(self, tmp_path):
        IO.save_checkpoint(state(1), tmp_path / "a.ckpt")
        (tmp_path / "last.ckpt").symlink_to("a.ckpt")
        (tmp_path / "a.ckpt").write_bytes(b"x")
        with pytest.raises(CheckpointError, match=r"a\.ckpt' is damaged"):
            IO.load_checkpoint(tmp_path / "last.ckpt")

    def test_file_without_sums_comes_with_a_note(self, tmp_path, monkeypatch):
        notes = []
        monkeypatch.setattr("moe_plugin.checkpoints.verified_io.rank_zero_info", notes.append)
        torch.save(state(1), tmp_path / "a.ckpt")
        assert IO.load_checkpoint(tmp_path / "a.ckpt")["global_step"] == 1
        assert len(notes) == 1
        assert "without a SHA-256" in notes[0]

    def test_address_is_one_whatever_folders_there_are(self):
        assert is_remote("http://host/a.ckpt")
        assert not is_remote("http:/a.ckpt")
        assert not is_remote(Path("runs/a::b/last.ckpt"))


class TestRemove:
    def test_all_that_belongs_to_it_goes(self, tmp_path):
        for step in (1, 2):
            IO.save_checkpoint(state(step), tmp_path / "last.ckpt")
        save_folder(tmp_path / "folder.ckpt", state(1))
        for name in ("last.ckpt", "folder.ckpt", "absent.ckpt"):
            IO.remove_checkpoint(str(tmp_path / name))
        assert names(tmp_path) == []


class TestLeftovers:
    def test_those_of_the_living_stay_and_those_of_the_dead_go(self, tmp_path):
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            with temporary_file(tmp_path / "a"), temporary_folder(tmp_path / "b") as folder:
                folder.mkdir()
                os.write(write, b".")
                time.sleep(60)
            os._exit(0)
        os.read(read, 1)
        remove_leftovers(tmp_path)
        assert len(names(tmp_path)) == 3
        os.kill(child, 9)
        os.waitpid(child, 0)
        (tmp_path / ".of_others.tmp").touch()
        remove_leftovers(tmp_path)
        assert names(tmp_path) == [".of_others.tmp"]


class TestTrainer:
    @pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
    @pytest.mark.filterwarnings("ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*")
    @pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
    def test_checkpoints_that_lightning_removes_leave_nothing(self, tmp_path):
        def run(epochs, **settings):
            keep = ModelCheckpoint(tmp_path, save_top_k=1, monitor="step", mode="max", save_last=True)
            quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
            trainer = lightning.Trainer(
                accelerator="cpu", max_epochs=epochs, plugins=[IO], callbacks=[keep], **quiet
            )
            project = HostProject(Host)
            trainer.fit(project, loader([torch.zeros(2, 8, dtype=torch.long)] * 2), **settings)
            return trainer

        run(3)
        kept = ["epoch=2-step=6.ckpt", "last.ckpt", "last.ckpt.previous"]
        assert names(tmp_path) == sorted([*kept, *(f"{name}.sha256" for name in kept)])
        assert run(4, ckpt_path="last").global_step == 8

    def test_weights_only_decides_whether_code_runs(self, tmp_path):
        torch.save(state(1) | {"extra": Canary(tmp_path / "canary")}, tmp_path / "a.ckpt")
        with pytest.raises(CheckpointError):
            IO.load_checkpoint(tmp_path / "a.ckpt", weights_only=None)
        assert not (tmp_path / "canary").exists()
