"""Ends of runs: signals at random moments to random processes, ranks that die or hang, commands that are killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

import moe_plugin.apps.launch.train_job
import moe_plugin.apps.launch.validate_config  # noqa: F401 (the forks find everything imported)
from moe_plugin.apps.launch import processes
from moe_plugin.apps.launch.command import one_line_errors
from moe_plugin.apps.launch.end_process import end_process
from moe_plugin.apps.launch.signals import STOPPED
from tests.apps.launch.small_job import NOISY, WORDS, configuration, write_texts
from tests.faults.forked_command import Command, fork, is_alive

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
HANG = 90.0
"""Seconds after which a trial counts as one that hangs, on a machine under load too."""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Command]:
    """Starts the small job with more words in a folder of its own below ``tmp_path``."""
    write_texts(tmp_path)
    monkeypatch.setenv("MOE_PLUGIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NODE_RANK", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = [*WORDS, NOISY, texts_in(tmp_path), "hydra.run.dir=run", "trainer.val_check_interval=8"]
    return lambda name, *more: Command(tmp_path / name, [*words, *more])


def texts_in(folder: Path) -> str:
    """Returns the word for the small job's texts that holds in any folder."""
    return f"data.source.sources={{letters: '{folder}/texts/a*.txt', digits: '{folder}/texts/d*.txt'}}"


def wait_until(is_so: Callable[[], object]) -> float:
    since = time.monotonic()
    while not is_so():
        assert time.monotonic() < since + HANG
        time.sleep(0.02)
    return time.monotonic() - since


def train_until(command: Command, steps: int) -> None:
    table = command.folder / "run" / "losses_1.txt"
    wait_until(lambda: table.exists() and len(table.read_text().splitlines()) > steps)


class TestSignals:
    def test_signals_at_random_moments_end_the_run_in_one_line(
        self, start: Callable[..., Command], figure: Callable[[str], None]
    ) -> None:
        slowest, codes, wrong, draw = 0.0, Counter[int | None](), [], random.Random(20)
        for strategy in ("single", "ddp", "fsdp"):
            words = (f"strategy={strategy}", "trainer.max_steps=20")
            whole = start(strategy, *words).wait(HANG)
            for trial in range(10):
                number, moment = draw.choice(SIGNALS), draw.uniform(0, whole)
                target = -1 if strategy == "single" else draw.choice((-1, 0, 1))
                command = start(f"{strategy}_{trial}", *words)
                time.sleep(moment)
                if target >= 0:
                    wait_until(lambda c=command, t=target: t in c.ranks() or c.poll() is not None)
                pid = command.pid if target < 0 else command.ranks().get(target, command.pid)
                if command.poll() is None and is_alive(pid):
                    os.kill(pid, number)
                slowest = max(slowest, command.wait(HANG))
                codes[command.code] += 1
                if fault := self.fault_of(command, number):
                    wrong.append(f"{number.name} to {target} of {strategy} after {moment:.2f} s: {fault}")
        figure(
            f"signals at random moments: {30 - len(wrong)} of 30 ended in one line, "
            f"the slowest after {slowest:.1f} s; exit codes {dict(codes)}"
        )
        assert wrong == []

    @staticmethod
    def fault_of(command: Command, number: int) -> str:
        """Returns what is wrong with the way a command ended."""
        lines = [line for line in command.out if line.startswith("stopped by ")]
        if command.code == 0:
            return "" if (command.folder / "run" / "summary.json").exists() else "no summary"
        if command.code not in (STOPPED, 128 + number) or lines != command.out or len(lines) != 1:
            return f"exit {command.code}, {command.out}"
        saved = lines[0].partition("ckpt_path=")[2]
        if (command.code == STOPPED) != bool(saved and Path(saved).exists()):
            return f"exit {command.code}, {lines}"
        return "ranks are left" if any(map(is_alive, command.ranks().values())) else ""

    def test_signals_in_the_first_seconds_of_whole_commands_end_them(
        self, tmp_path: Path, figure: Callable[[str], None]
    ) -> None:
        (tmp_path / "place").mkdir()
        slowest, draw, wrong = 0.0, random.Random(7), []
        for trial in range(6):
            number = draw.choice(SIGNALS)
            command = subprocess.Popen(
                [sys.executable, "-m", "moe_plugin.apps.train", *WORDS, "strategy=ddp"],
                cwd=tmp_path / "place",
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
                stderr=subprocess.PIPE,
                text=True,
            )
            time.sleep(draw.uniform(0.2, 4))
            command.send_signal(number)
            since = time.monotonic()
            _, err = command.communicate(timeout=HANG)
            slowest = max(slowest, time.monotonic() - since)
            is_line = err in ("", f"stopped by {number.name} before there was anything to save\n")
            if command.returncode not in (128 + number, -number) or not is_line:
                wrong.append((trial, command.returncode, err))
        figure(f"signals while torch is imported: {6 - len(wrong)} of 6, the slowest after {slowest:.1f} s")
        assert wrong == []


class TestRanks:
    @pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
    def test_killed_rank_is_named_with_its_step_in_one_line(
        self, strategy: str, start: Callable[..., Command], figure: Callable[[str], None]
    ) -> None:
        command = start(strategy, f"strategy={strategy}", "trainer.max_steps=100000")
        train_until(command, 10)
        os.kill(command.ranks()[1], signal.SIGKILL)
        seconds = command.wait(HANG)
        figure(f"SIGKILL of rank 1 of {strategy}: named after {seconds:.1f} s in {len(command.out)} line")
        (line,) = command.out
        assert line.startswith("error: rank 1 was killed by SIGKILL in step ")
        assert line.endswith(f"; go on with ckpt_path={command.folder}/run/checkpoints/last.ckpt")
        assert command.code == 1

    def test_rank_that_hangs_is_mentioned_and_then_named_within_the_time_out(
        self,
        start: Callable[..., Command],
        figure: Callable[[str], None],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(processes, "SILENT", 2.0)
        command = start("ddp", "strategy=ddp", "trainer.max_steps=100000", "strategy.timeout=10")
        train_until(command, 10)
        os.kill(command.ranks()[1], signal.SIGSTOP)
        seconds = command.wait(HANG)
        figure(f"SIGSTOP of rank 1, time-out 10 s: named after {seconds:.1f} s")
        mention, line = command.out
        assert mention.startswith("no sign of life from rank 1 for 2 s, in step ")
        assert line.startswith("error: rank 1 made no progress for 9 s in step ")
        assert command.code == 1
        assert not any(map(is_alive, command.ranks().values()))

    def test_signal_ends_a_run_whose_rank_hangs(
        self, start: Callable[..., Command], figure: Callable[[str], None]
    ) -> None:
        command = start("ddp", "strategy=ddp", "trainer.max_steps=100000")
        train_until(command, 10)
        os.kill(command.ranks()[0], signal.SIGSTOP)
        os.kill(command.pid, signal.SIGTERM)
        seconds = command.wait(HANG)
        figure(f"SIGTERM to a run with a stopped rank: ended after {seconds:.1f} s")
        (line,) = command.out
        assert line.startswith("stopped by SIGTERM (rank 0 made no progress for 8 s in step ")
        assert command.code == STOPPED

    def test_no_rank_outlives_its_command(
        self, start: Callable[..., Command], figure: Callable[[str], None]
    ) -> None:
        seconds = []
        for strategy in ("ddp", "fsdp"):
            command = start(strategy, f"strategy={strategy}", "trainer.max_steps=100000")
            train_until(command, 3)
            os.kill(command.pid, signal.SIGKILL)
            command.wait(HANG)
            ranks = command.ranks().values()
            seconds.append(wait_until(lambda ranks=ranks: not any(map(is_alive, ranks))))
        figure(f"kill -9 of the command: 0 orphans of 4 ranks, the last ended after {max(seconds):.1f} s")


class TestMachines:
    """The commands that SLURM starts, one on each machine; here both are on this one."""

    @pytest.fixture
    def machines(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Command]]:
        def begin(*words: str) -> list[Command]:
            more = (texts_in(tmp_path), "strategy=ddp", "strategy.devices=1")
            config = configuration(*words, *more, folder=tmp_path / "run")
            config.trainer.num_nodes = 2
            OmegaConf.save(config, tmp_path / "run" / "config.yaml")
            monkeypatch.setenv("SLURM_JOB_NODELIST", "localhost")
            monkeypatch.setenv("SLURM_JOB_ID", str(os.getpid()))
            commands = []
            for node in ("0", "1"):
                monkeypatch.setenv("SLURM_NODEID", node)
                commands.append(Command(tmp_path / node, [], lambda _: run(tmp_path / "run", config)))
            return commands

        def run(folder: Path, config: DictConfig) -> None:
            with one_line_errors():
                processes.run_in_processes(folder, config)

        write_texts(tmp_path)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("MOE_PLUGIN_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("NODE_RANK", raising=False)
        return begin

    def test_both_finish_one_run(self, tmp_path: Path, machines: Callable[..., list[Command]]) -> None:
        commands = machines(NOISY)
        for command in commands:
            command.wait(HANG)
        assert [command.code for command in commands] == [0, 0], [command.out for command in commands]
        assert (tmp_path / "run" / "summary.json").exists()

    def test_rank_killed_on_one_ends_both(
        self, machines: Callable[..., list[Command]], figure: Callable[[str], None]
    ) -> None:
        commands = machines(NOISY, "trainer.max_steps=100000")
        table = commands[0].folder.parent / "run" / "losses_1.txt"
        wait_until(lambda: table.exists() and len(table.read_text().splitlines()) > 10)
        os.kill(commands[1].ranks()[1], signal.SIGKILL)
        seconds = sum(command.wait(HANG) for command in commands)
        figure(f"SIGKILL of a rank on another machine: both commands ended after {seconds:.1f} s")
        assert [command.code for command in commands] == [1, 1]
        assert "rank 1 was killed by SIGKILL in step " in commands[1].out[-1]


class TestEnd:
    def test_threads_of_gloo_do_not_kill_a_process_that_has_finished(
        self, tmp_path: Path, figure: Callable[[str], None]
    ) -> None:
        pids = [
            fork(lambda t=trial, r=rank: leave_collectives(tmp_path / str(t), r), os.environ)
            for trial in range(15)
            for rank in (0, 1)
        ]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        figure(f"ends with collectives not waited for: {codes.count(0)} of 30 exit with 0")
        assert codes == [0] * 30


def leave_collectives(store: Path, rank: int) -> None:
    """Begins more collectives than it waits for, and ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    for _ in range(200):
        dist.all_reduce(torch.ones(1000), async_op=True)
    end_process(0)
