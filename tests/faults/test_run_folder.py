"""Faults of a run's folder: shared, in use, on a disk that fails. Commands are forks of this process."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import moe_plugin.apps.launch.train_job  # noqa: F401 (before the forks)
from moe_plugin.apps import train
from tests.apps.launch.small_job import WORDS, write_texts
from tests.faults.failing_disk import fail, mend, mount_small_disk

FAILING = [*WORDS, "model._target_=tests.faults.failing_disk.ModelOnFailingDisk"]
SHORT = ["trainer.val_check_interval=2", "trainer.log_every_n_steps=1"]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_texts(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOE_PLUGIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


class Command:
    """A forked process that does something and prints into a file."""

    def __init__(self, act: Callable[[], None]) -> None:
        Path("out").mkdir(exist_ok=True)
        self.process = os.fork()
        if self.process == 0:
            self._run(act)

    def end(self) -> tuple[int, list[str]]:
        """Returns the exit code and the lines of stderr, without what tells how a run is resumed."""
        _, status = os.waitpid(self.process, 0)
        lines = Path(f"out/{self.process}").read_text().splitlines()
        return os.waitstatus_to_exitcode(status), [line for line in lines if not line.startswith("resume: ")]

    def _run(self, act: Callable[[], None]) -> None:
        code = 99
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(f"out/{os.getpid()}", os.O_WRONLY | os.O_CREAT), 2)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            act()
            code = 0
        except SystemExit as error:
            code = error.code
        finally:
            if code == 99:
                sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            os._exit(code)


def train_in_fork(*words: str) -> Command:
    return Command(lambda: train.main([*WORDS, *words]))


class TestFolders:
    def test_runs_of_one_date_have_folders_of_their_own(self, figure) -> None:
        right = 0
        for pair in range(6):
            dated = f"hydra.run.dir=runs/{pair}/" + "${now:%Y}"
            commands = [train_in_fork(dated, f"seed={seed}", "trainer.max_steps=1") for seed in (1, 2)]
            assert [command.end() for command in commands] == [(0, []), (0, [])]
            seeds = [
                (
                    OmegaConf.load(run / "config.yaml").seed,
                    json.loads((run / "summary.json").read_text())["seed"],
                )
                for run in Path(f"runs/{pair}").iterdir()
            ]
            right += sorted(seeds) == [(1, 1), (2, 2)]
        figure(f"pairs of runs started in the same second: {right} of 6 have folders of their own")
        assert right == 6


class TestLock:
    def test_second_run_is_refused_and_changes_nothing_while_the_first_lives(self, figure) -> None:
        words = ["hydra.run.dir=runs/here", *SHORT]
        first = train_in_fork(*words, "trainer.max_steps=100000")
        while not Path("runs/here/checkpoints/last.ckpt").exists():
            time.sleep(0.1)
        os.kill(first.process, signal.SIGSTOP)
        before = _content(Path("runs"))
        code, (line,) = train_in_fork(*words, "ckpt_path=last").end()
        sweep, (other,) = train_in_fork("-m", "seed=1", "hydra.sweep.dir=runs", "ckpt_path=last").end()
        assert (code, sweep) == (2, 2)
        assert f"in use; process {first.process} on" in line
        assert f"in use; process {first.process} on" in other
        (Path("runs") / ".lock").unlink()
        assert _content(Path("runs")) == before
        os.kill(first.process, signal.SIGKILL)
        assert first.end()[0] == -signal.SIGKILL
        step = torch.load("runs/here/checkpoints/last.ckpt")["global_step"]
        assert train_in_fork(*words, "ckpt_path=last", f"trainer.max_steps={step + 2}").end() == (0, [])
        figure("second run or sweep in one folder: refused; after a SIGKILL of the first: continues")


def _content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FAULTS = [
    "full:0@0",
    "full:0@3",
    "full:8192@3",
    "full:100000@5",
    "full:0@end",
    "read_only@3",
    "run_deleted@3",
]
TRIALS = [*((fault, "default") for fault in FAULTS), *((fault, "csv") for fault in FAULTS[1::2])]


class TestDisk:
    def test_failing_disk_is_one_line_and_the_last_checkpoint_is_left(self, figure, workplace: Path) -> None:
        _need_mounts(workplace)
        right = sum(_is_right(fault, logger) for fault, logger in TRIALS)
        figure(f"disk full, read-only, deleted: {right} of {len(TRIALS)} one line, last checkpoint intact")
        assert right == len(TRIALS)

    def test_full_disk_at_the_start_is_wrong_use(self, workplace: Path) -> None:
        _need_mounts(workplace)

        def start() -> None:
            mount_small_disk(Path("disk"))
            fail("full:0", Path("disk/run"))
            train.main([*WORDS, "hydra.run.dir=disk/run"])

        code, (line,) = Command(start).end()
        assert code == 2
        assert "'hydra.run.dir' must be a folder that can be written (No space left on device)" in line

    def test_failing_disk_of_one_rank_ends_all_in_one_line(self, figure, workplace: Path) -> None:
        _need_mounts(workplace)
        command = Command(lambda: _fail("full:0@3", "csv", "strategy=ddp"))
        code, lines = command.end()
        assert code == 0, lines
        (line,) = (line for line in lines if line.startswith("error: "))
        assert line.endswith("last.ckpt is left to continue from.")
        figure("disk full under rank 0 of ddp: one line, all ranks end")


def _need_mounts(workplace: Path) -> None:
    (workplace / "disk").mkdir()
    code, lines = Command(lambda: mount_small_disk(Path("disk"))).end()
    if code:
        pytest.skip(f"no small file system can be mounted here: {lines[-1]}")


def _is_right(fault: str, logger: str) -> bool:
    """Returns whether a failing run ends in one line, and continues when its disk is mended."""
    code, lines = Command(lambda: _fail_and_continue(fault, logger)).end()
    saved = not fault.endswith("@0") and "deleted" not in fault
    left = "last.ckpt is left to continue from." if saved else "No checkpoint is left."
    right = code == 0 and len(lines) == 1 and lines[0].endswith(left)
    if not right:
        print(fault, logger, code, *lines, sep="\n")
    return right


def _fail_and_continue(fault: str, logger: str) -> None:
    words = _fail(fault, logger)
    last = Path("disk/run/checkpoints/last.ckpt")
    if last.exists():
        torch.load(last)
    del os.environ["FAULT"]
    mend(fault.partition("@")[0], Path("disk/run"))
    train.main([*words, "ckpt_path=last"])
    assert Path("disk/run/summary.json").exists()


def _fail(fault: str, logger: str, *words: str) -> list[str]:
    """Trains on a disk that fails, and returns the command line."""
    mount_small_disk(Path("disk"))
    os.environ["FAULT"] = fault
    words = [*FAILING, *SHORT, f"logger={logger}", "hydra.run.dir=disk/run", *words]
    with pytest.raises(SystemExit) as ended:
        train.main(words)
    assert ended.value.code == 1
    return words
