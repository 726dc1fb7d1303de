"""Runs one job in several processes: each starts from the run's resolved configuration, never from the command line.

So a console script, ``python -m`` and each job of a sweep are launched the same way, and a job's processes can't
start a sweep of their own. The command brings all down when one fails, hangs, or a signal comes.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig

from moe_plugin.apps.launch.deadline import STOP_SIGNALS
from moe_plugin.apps.launch.last_checkpoint import newest_checkpoint
from moe_plugin.apps.launch.meeting_point import MeetingPoint
from moe_plugin.apps.launch.process_environment import for_processes, is_launched
from moe_plugin.apps.launch.signals import STOPPED, StopSignals, stopped_without_saving, tell
from moe_plugin.apps.launch.supervise import LEAVING, SAVED, Rank, Ranks
from moe_plugin.apps.report.stopped import read_stopped, write_stopped
from moe_plugin.errors import ConfigError, RunError
from moe_plugin.number_checks import check_positive

TIMEOUT = 1800.0
"""Seconds that ranks wait for one another in a run whose configuration is older than ``strategy.timeout``."""
SILENT = 30.0
"""Seconds after which a rank that doesn't run is mentioned."""
SILENT_AT_END = 8.0
"""Seconds after which it is killed if a signal asks the run to end."""


def number_of_processes(config: DictConfig) -> int:
    """Return how many processes the job wants on each machine: one per device."""
    devices = config.strategy.devices
    if devices != "auto":
        return devices
    return max(1, torch.cuda.device_count()) if config.trainer.accelerator != "cpu" else 1


def check_processes(config: DictConfig) -> None:
    """Check that this machine can run the processes that a job wants.

    Raises:
        ConfigError: More than there are GPUs, others than torchrun has started, or machines without a launcher.
    """
    devices, nodes, gpus = number_of_processes(config), config.trainer.num_nodes, torch.cuda.device_count()
    check_positive("strategy.timeout", config.strategy.get("timeout", TIMEOUT))
    if config.trainer.accelerator in ("gpu", "cuda", "auto") and 0 < gpus < devices:
        fix = "trainer.accelerator=cpu takes any number."
        raise ConfigError("strategy.devices", f"must be <= {gpus}, the GPUs here", devices, fix)
    if is_launched() and devices * nodes != int(os.environ["WORLD_SIZE"]):
        processes = f"{os.environ['WORLD_SIZE']} processes with trainer.num_nodes={nodes}"
        raise ConfigError("strategy.devices", f"must give {processes}, as torchrun started them", devices)
    if nodes > 1 and not is_launched():
        rule = "must be 1 unless torchrun runs on each machine or hydra/launcher=slurm is given"
        raise ConfigError("trainer.num_nodes", rule, nodes, "docs/running.md has the lines.")


def run_in_processes(run_folder: Path, config: DictConfig) -> None:
    """Run a job in several processes, and wait.

    Args:
        run_folder: Holds the job's ``config.yaml``.
        config: The same configuration.

    Raises:
        RunError: A process failed, died or hung; it names the user's error, if it was one, or the rank and step.
        SystemExit: A signal stopped the run; with code `STOPPED` if it can be continued.
    """
    number = number_of_processes(config)
    arguments = ("-m", "moe_plugin.apps.launch.worker_process", str(run_folder), str(os.getpid()))
    with for_processes(number), StopSignals() as signals, MeetingPoint(config.trainer.num_nodes) as meeting:
        signals.deferred = True
        with Ranks(arguments, meeting.places(number)) as ranks:
            _Watch(ranks, signals, meeting, run_folder).until_all_end(config.strategy.timeout)


class _Watch:
    """The command while its processes run."""

    def __init__(self, ranks: Ranks, signals: StopSignals, meeting: MeetingPoint, folder: Path) -> None:
        self.ranks, self.signals, self.meeting, self.folder = ranks, signals, meeting, folder
        self._passed_on = 0
        self._mentioned: list[Rank] = []

    def until_all_end(self, timeout: float) -> None:
        """Look at the processes until none is left, and report the first that fails."""
        while self.ranks.running:
            self._pass_on()
            self.ranks.look()
            if failed := [rank for rank in self.ranks.all if rank.code]:
                self._report(min(failed, key=_cause))
            elif self.meeting.has_failed():
                self._end("another machine's processes failed")
            self._end_hung(timeout)

    def _pass_on(self) -> None:
        if self.signals.received != self._passed_on:
            self._passed_on = self.signals.received
            self.ranks.pass_on(self._passed_on)

    def _end_hung(self, timeout: float) -> None:
        # A little before those that wait for it time out and fail too.
        limit = SILENT_AT_END if self.signals.received else 0.9 * timeout
        if hung := self.ranks.stopped(limit) or self.ranks.behind(0.9 * timeout):
            for rank in hung:  # those that wait for it then fail at once
                rank.process.kill()
            seconds = max(hung[0].stopped, hung[0].idle)
            self._end(f"{_names(hung)} made no progress for {seconds:.0f} s {hung[0].where}")
        silent = [rank for rank in self.ranks.stopped(SILENT) if rank not in self._mentioned]
        if silent:
            self._mentioned += silent
            tell(f"no sign of life from {_names(silent)} for {SILENT:.0f} s, {silent[0].where}")

    def _report(self, rank: Rank) -> None:
        """End the others of a rank that has ended, and say why it did."""
        code, trace = rank.code or 0, rank.state.trace.decode(errors="replace")
        number = -code if code < 0 else code - 128
        if code == STOPPED:
            self.ranks.end(SAVED)
            self._stop(STOPPED, read_stopped(self.folder) or "stopped")
        if number in STOP_SIGNALS or self.signals.received:
            self.ranks.end(LEAVING)
            self._stop_by(number if number in STOP_SIGNALS else self.signals.received)
        if code < 0:
            self._end(f"{_names([rank])} was killed by {signal.Signals(number).name} {rank.where}")
        self._end(f"{_names([rank])} failed {rank.where}", rank.state.error.decode(errors="replace"), trace)

    def _end(self, why: str, reported: str = "", trace: str = "") -> None:
        """End all because one can't go on."""
        self.meeting.tell_failure()
        self.ranks.end(LEAVING)
        if self.signals.received:
            self._stop_by(self.signals.received, f" ({why})")
        print(trace, end="", file=sys.stderr)
        saved = newest_checkpoint(self.folder)
        where = f"; go on with ckpt_path={saved}" if saved else ""
        error = reported or f"{why}{where}"
        write_stopped(self.folder, error)
        raise RunError(error)

    def _stop_by(self, number: int, why: str = "") -> None:
        had_begun = any(rank.state.moves for rank in self.ranks.all)
        name = f"{signal.Signals(number).name}{why}"
        code, line = stopped_without_saving(name, self.folder if had_begun else None)
        self._stop(code or 128 + number, line)

    def _stop(self, code: int, line: str) -> None:
        tell(line)
        raise SystemExit(code)


def _cause(rank: Rank) -> tuple[bool, bool, float]:
    """Return what sorts the rank first that failed by itself, before those that missed it."""
    code = rank.code or 0
    is_stop = code - 128 in STOP_SIGNALS
    return code != STOPPED, code > 0 and not is_stop, rank.state.failed_at or float("inf")


def _names(ranks: list[Rank]) -> str:
    numbers = ", ".join(str(rank.number) for rank in ranks)
    return f"rank {numbers}" if len(ranks) == 1 else f"ranks {numbers}"
