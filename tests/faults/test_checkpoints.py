"""Checkpoints are whole or not there, whatever happens while they are saved and to their files afterwards."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment

from moe_plugin.apps.launch.last_checkpoint import find_checkpoint
from moe_plugin.apps.launch.train_job import train
from moe_plugin.checkpoints import VerifiedCheckpointIO
from moe_plugin.checkpoints.safe_load import load_file
from moe_plugin.checkpoints.temporary import remove_leftovers
from moe_plugin.errors import CheckpointError
from tests.apps.launch.small_job import configuration, write_texts
from tests.checkpoints.hostile import Sharding, hide_, one_rank, state

IO = VerifiedCheckpointIO()
MEGABYTE = 250_000  # in fp32
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def last_of(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


def step_of(path: str | Path) -> int:
    """Returns the step of a checkpoint, after comparing every number in it."""
    loaded = IO.load_checkpoint(path)
    step = loaded["global_step"]
    for name, value in state(step, len(loaded["state_dict"]["a"]))["state_dict"].items():
        assert loaded["state_dict"][name].equal(value)
    return step


def save_files(run: Path) -> None:
    """Saves step after step, as a run does, and reports each that is saved."""
    for step in range(1000):
        for name in ("best.ckpt", "last.ckpt"):
            IO.save_checkpoint(state(step, MEGABYTE), last_of(run).with_name(name))
        os.write(1, bytes([step % 256]))


def save_folders(run: Path) -> None:
    strategy = one_rank()
    for step in range(1000):
        strategy.save_checkpoint(state(step, MEGABYTE), last_of(run))
        os.write(1, bytes([step % 256]))


@contextmanager
def in_child(work, *args):
    """Forks a process that works until it is killed; the pipe has a byte for each step that it has saved."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(write, 1)
            work(*args)
        finally:
            os._exit(1)
    os.close(write)
    try:
        yield child, read
    finally:
        os.close(read)


def kill_while_saving(work, run: Path) -> tuple[int, int, int]:
    """Returns the step reported last, the one found after a kill, and how many temporaries the kill left."""
    with in_child(work, run) as (child, read):
        saved = os.read(read, 1)[0]
        time.sleep(random.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while more := os.read(read, 1):
            saved = more[0]
    folder = last_of(run).parent
    left = len(list(folder.glob("*unfinished*")) + list(folder.glob(".*unfinished*")))
    found = step_of(find_checkpoint("last", run))
    remove_leftovers(folder)
    assert not list(folder.glob(".*"))
    return saved, found, left


class TestKill:
    @pytest.mark.parametrize(
        ("work", "trials"), [(save_files, 24), (save_folders, 12)], ids=["files", "folders"]
    )
    @pytest.mark.parametrize("elsewhere", [False, True], ids=["same file system", "TMPDIR on another"])
    def test_every_run_resumes(self, work, trials, elsewhere, tmp_path, monkeypatch, figure):
        if elsewhere:
            if os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
                pytest.skip("/dev/shm is no other file system")
            monkeypatch.setenv("TMPDIR", "/dev/shm")
            monkeypatch.setattr("tempfile.tempdir", None)
        random.seed(trials + elsewhere)
        resumed = interrupted = 0
        for trial in range(trials):
            saved, found, left = kill_while_saving(work, tmp_path / str(trial))
            shutil.rmtree(tmp_path / str(trial))
            resumed += found in (saved, saved + 1)
            interrupted += left > 0
        where = "TMPDIR on another file system" if elsewhere else "same file system"
        figure(
            f"SIGKILL while saving {work.__name__[5:]}, {where}: {resumed} of {trials} resume, "
            f"{interrupted} were in the middle of a file, nothing is left after the next start"
        )
        assert resumed == trials
        assert interrupted


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, random.randrange(path.stat().st_size))


def empty(path: Path) -> None:
    os.truncate(path, 0)


def overwrite(path: Path) -> None:
    path.write_bytes(random.randbytes(path.stat().st_size))


def damage_sums(path: Path) -> None:
    """Any character of the first sum, the end of the file, all of it, or a line of text."""
    text = path.read_text()
    sort = random.randrange(4)
    if sort == 0:
        place = random.randrange(64)
        path.write_text(text[:place] + ("0" if text[place] != "0" else "1") + text[place + 1 :])
    elif sort == 1:
        path.write_text(text[: random.randrange(1, 60)])
    else:
        path.write_text("" if sort == 2 else "not a sum\n" + text)


DAMAGES = (flip, flip, flip, truncate, empty, overwrite)


def damage_file(last: Path) -> Path:
    """Damages a checkpoint of one file, and returns what is to be named."""
    if random.randrange(5) == 0:
        sums = last.with_name(f"{last.name}.sha256")
        damage_sums(sums)
        return last
    random.choice(DAMAGES)(last)
    return last


def damage_folder(last: Path) -> Path:
    """Damages a file of a folder, or exchanges or removes it."""
    shards = sorted(last.glob("*.distcp"))
    sort = random.randrange(6)
    if sort == 0:
        one, other = (shard.read_bytes() for shard in shards)
        shards[0].write_bytes(other)
        shards[1].write_bytes(one)
        return last
    if sort == 1:
        random.choice([*shards, last / ".metadata", last / "meta.pt"]).unlink()
        return last
    if sort == 2:
        damage_sums(last / "SHA256SUMS")
        return last
    random.choice(DAMAGES)(random.choice([*shards, last / ".metadata", last / "meta.pt"]))
    return last


def save_twice(rank: int, results: dict, run: str) -> None:
    """Two ranks save folders, as in a run with `save_distributed_checkpoint`."""
    strategy = Sharding(dist.get_world_size(), 1, save_distributed_checkpoint=True)
    strategy.cluster_environment = environment = LightningEnvironment()
    environment.set_world_size(dist.get_world_size())
    environment.set_global_rank(rank)
    strategy.parallel_devices = ["cpu"] * dist.get_world_size()
    for step in (1, 2):
        strategy.save_checkpoint(state(step), last_of(Path(run)))
    dist.barrier()
    strategy._verified(last_of(Path(run)), None)


def damages_found(damage, good: Path, run: Path, capfd) -> int:
    """Returns how many of 40 damages are detected, named in one line, and fallen back from."""
    found = 0
    for trial in range(40):
        random.seed(trial)
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(good, run)
        named = str(damage(last_of(run)))
        with pytest.raises(CheckpointError) as error:
            IO.load_checkpoint(last_of(run))
        assert named in str(error.value)
        capfd.readouterr()
        assert step_of(find_checkpoint("last", run)) == 1
        (line,) = capfd.readouterr().err.splitlines()
        assert line == f"{error.value} Continuing from '{last_of(run)}.previous'."
        found += "\n" not in str(error.value)
    return found


class TestDamage:
    def test_of_a_file_is_detected_and_the_one_before_taken(self, tmp_path, capfd, figure):
        for step in (1, 2):
            IO.save_checkpoint(state(step), last_of(tmp_path / "good"))
        found = damages_found(damage_file, tmp_path / "good", tmp_path / "run", capfd)
        figure(f"damaged checkpoints, files: {found} of 40 detected and named in one line, with fallback")
        assert found == 40

    def test_of_a_folder_is_detected_and_the_one_before_taken(self, tmp_path, on_ranks, capfd, figure):
        on_ranks(2, save_twice, str(tmp_path / "good"))
        assert len(list(last_of(tmp_path / "good").glob("*.distcp"))) == 2
        found = damages_found(damage_folder, tmp_path / "good", tmp_path / "run", capfd)
        figure(f"damaged checkpoints, folders: {found} of 40 detected and named in one line, with fallback")
        assert found == 40

    def test_of_all_is_an_error_that_names_the_last(self, tmp_path):
        for step in (1, 2):
            IO.save_checkpoint(state(step), last_of(tmp_path))
        for path in last_of(tmp_path).parent.glob("last.ckpt*"):
            empty(path)
        with pytest.raises(CheckpointError, match=r"last\.ckpt.* No other checkpoint of the run is good"):
            find_checkpoint("last", tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, leave: int) -> None:
    """Leaves so many bytes free."""
    (disk / "ballast").unlink(missing_ok=True)
    with (disk / "ballast").open("wb") as file:
        file.truncate(0)
        file.write(bytes(max(0, shutil.disk_usage(disk).free - leave)))


class TestFullDisk:
    @pytest.mark.parametrize("kind", ["file", "folder"])
    def test_one_before_stays_and_the_error_is_plain(self, kind, small_disk, figure):
        strategy = None if kind == "file" else one_rank()
        saver, last = strategy or IO, last_of(small_disk)
        intact = 0
        for leave in range(0, 2 * 2**20, 2**17):  # a checkpoint needs a little more
            fill(small_disk, 2**23)
            saver.save_checkpoint(state(1, MEGABYTE), last)
            fill(small_disk, leave)
            with pytest.raises(OSError, match=r"No space left on device: '.*last\.ckpt'") as error:
                saver.save_checkpoint(state(2, MEGABYTE), last)
            assert error.value.errno == errno.ENOSPC
            assert not list(last.parent.glob(".*"))
            intact += step_of(last) == 1
            shutil.rmtree(last.parent)
        if strategy:
            dist.destroy_process_group()
        figure(f"full disk while saving a {kind}: {intact} of 16 leave the checkpoint before intact")
        assert intact == 16


class TestRun:
    @pytest.mark.filterwarnings("ignore")
    def test_whose_last_is_damaged_goes_on_from_the_one_before_to_the_same_end(
        self, tmp_path, monkeypatch, capfd, figure
    ):
        monkeypatch.chdir(tmp_path)
        write_texts(tmp_path)
        config = configuration("trainer.val_check_interval=3", folder=tmp_path / "run")
        train(config)
        last = last_of(tmp_path / "run")
        first_end = load_file(last)
        flip(last)
        config.ckpt_path = find_checkpoint("last", tmp_path / "run")
        assert config.ckpt_path == f"{last}.previous"
        assert "last.ckpt' is damaged" in capfd.readouterr().err
        assert load_file(config.ckpt_path)["global_step"] == 3
        train(config)
        second_end = load_file(last)
        assert second_end["global_step"] == first_end["global_step"] == 6
        for name, weight in first_end["state_dict"].items():
            assert second_end["state_dict"][name].equal(weight)
        figure("a run whose last checkpoint is damaged: ends bit-equal from the one before")


class TestCommand:
    def test_checkpoint_that_runs_code_is_refused_before_anything_is_created(self, tmp_path, figure):
        canaries = 0
        for kind in ("file", "byte entry"):
            sent = hide_(kind, tmp_path / f"{kind}.ckpt", tmp_path / "canary")
            command = [sys.executable, "-m", "moe_plugin.apps.train", f"ckpt_path='{sent}'"]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
            (line,) = done.stderr.splitlines()
            assert line.startswith(f"error: '{sent}")
            assert "'os.makedirs'" in line
            canaries += (tmp_path / "canary").exists()
        figure(f"checkpoints that run code, moe-train: {canaries} of 2 ran it")
        assert canaries == 0
