"""Whole commands as forks of a process that has imported everything: each trial takes a second or two, not twenty."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

from moe_plugin.apps import train
from moe_plugin.apps.launch import rank_state, supervise, worker_process
from moe_plugin.apps.launch.end_process import run_and_end


class Forked:
    """Stands for `subprocess.Popen` of one rank; the rank's number and process id are appended to ``pids.txt``."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], **_: object) -> None:
        self.returncode: int | None = None
        self.pid = fork(lambda: worker_process.main(command[3:]), env)
        with Path("pids.txt").open("a") as file:
            file.write(f"{env['RANK']} {self.pid}\n")

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> None:
        while self.poll() is None:
            time.sleep(0.01)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork(task: Callable[[], object], env: Mapping[str, str]) -> int:
    """Starts a session of its own that does the task and ends as a process does."""
    return os.fork() or _begin(task, dict(env))


def _begin(task: Callable[[], object], env: Mapping[str, str]) -> NoReturn:
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    atexit._clear()
    rank_state.own_state.cache_clear()
    run_and_end(task)


class Command:
    """``moe-train`` with the given words, or another task, in a folder; what it prints is in ``out.txt`` there."""

    def __init__(self, folder: Path, words: Sequence[str], task: Callable[..., object] = train.main) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.pid = fork(lambda: self._run(task, words), {**os.environ})
        self.code: int | None = None

    def _run(self, task: Callable[..., object], words: Sequence[str]) -> None:
        os.chdir(self.folder)
        file = os.open("out.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        supervise.subprocess = SimpleNamespace(Popen=Forked)  # pyright: ignore[reportAttributeAccessIssue]
        task(words)

    def ranks(self) -> dict[int, int]:
        """Returns the process id of each rank that was started."""
        path = self.folder / "pids.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return {int(rank): int(pid) for rank, pid in map(str.split, lines)}

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, seconds: float) -> float:
        """Waits for the end, kills what is left after the given time, and returns the seconds it took."""
        since = time.monotonic()
        while self.poll() is None and time.monotonic() < since + seconds:
            time.sleep(0.02)
        for pid in [self.pid, *self.ranks().values()] if self.poll() is None else []:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        return time.monotonic() - since

    @property
    def out(self) -> list[str]:
        return (self.folder / "out.txt").read_text().splitlines()


def is_alive(pid: int) -> bool:
    """Returns whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
