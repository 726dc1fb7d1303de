"""Signals that ask a run to end: noted when they come, obeyed where the run can be continued later."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from moe_plugin.apps.launch.deadline import STOP_SIGNALS, Deadline
from moe_plugin.apps.launch.rank_state import is_supervised, own_state
from moe_plugin.apps.received.printable import printable

# "Temporary failure, try again" of sysexits.h: the run was stopped by a signal and can continue from its checkpoint.
STOPPED = os.EX_TEMPFAIL
UNWINDING = 5.0
"""Seconds in which a process ends that has nothing to save."""


class StopSignals:
    """Notes stop signals within its block; afterwards hands them on to whoever handled them before.

    A signal ends the program at once unless it is deferred: then it waits in `received` for a step boundary. A
    second Ctrl-C always ends the program. What the shell makes us ignore (``nohup``) stays ignored.

    Attributes:
        received: Number of the last stop signal; 0 before any.
        deferred: Whether signals wait, because there is something to save.
        patience: Returns how many seconds may pass without a move while signals wait; then the program ends.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Handle nothing yet.

        Args:
            folder: The run's, where a checkpoint may be.
        """
        self.received = 0
        self.deferred = False
        self.patience: Callable[[], float] = lambda: math.inf
        self._folder = folder
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
        self._deadline = Deadline(self._limit, lambda: own_state().moves, self._give_up)

    def __enter__(self) -> StopSignals:
        """Take over the signals; only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return self
        handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self._before = {n: handler for n, handler in handlers.items() if handler is not signal.SIG_IGN}
        self._deadline.start()
        for number in self._before:
            signal.signal(number, self.note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back; a launcher such as submitit then does its part for the one that came.

        Raises:
            SystemExit: A signal ended the program, and code of a library turned that into an error.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._deadline.stop()
        before = self._before.get(self.received)
        is_ours = isinstance(getattr(before, "__self__", None), StopSignals)
        if callable(before) and before is not signal.default_int_handler and not is_ours:
            before(self.received, None)
        if isinstance(error, Exception) and self.received and not self.deferred:
            raise SystemExit(128 + self.received) from None

    def note(self, signum: int, _: FrameType | None) -> None:
        """Handle a signal, called as `signal.signal` documents.

        Raises:
            SystemExit: If signals are not deferred, and at a second Ctrl-C; with the exit code that shells give to
                the signal.
        """
        is_second = signum == signal.SIGINT == self.received
        if self.received and not self.deferred:
            return  # the program is ending
        self.received, self.deferred = signum, self.deferred and not is_second
        if not self.deferred:
            why = "a second Ctrl-C" if is_second else f"{self.name} before there was anything to save"
            tell(f"stopped by {why}")
            raise SystemExit(128 + signum)

    @property
    def name(self) -> str:
        """The last signal in words."""
        return signal.Signals(self.received).name

    def _limit(self) -> float:
        return self.patience() if self.deferred else UNWINDING

    def _give_up(self, number: int) -> None:
        name = signal.Signals(number).name
        code, line = stopped_without_saving(name, self._folder if self.deferred else None)
        tell(line)
        os._exit(code or 128 + number)


def is_ending() -> bool:
    """Return whether a signal is ending the program."""
    signals = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return isinstance(signals, StopSignals) and signals.received > 0 and not signals.deferred


def stopped_without_saving(what: str, folder: Path | None) -> tuple[int, str]:
    """Return how a run ended that a signal stopped but that saved nothing then: exit code, 0 for the signal's; line.

    Args:
        what: The signal's name, and what kept the run from saving.
        folder: The run's, where an earlier checkpoint may be; None if training had not begun.
    """
    if folder is not None:
        from moe_plugin.apps.launch.last_checkpoint import newest_checkpoint
        from moe_plugin.apps.report.stopped import write_stopped

        saved = newest_checkpoint(folder)
        where = f"go on with ckpt_path={saved}" if saved else "nothing was saved"
        line = f"stopped by {what} before the step under way was saved; {where}"
        write_stopped(folder, line)
        return STOPPED if saved else 0, line
    return 0, f"stopped by {what} before there was anything to save"


def tell(line: str) -> None:
    """Print how this process ends, safe in a signal handler; one that our command started stays silent."""
    if not is_supervised():
        os.write(2, f"{printable(line)}\n".encode())
