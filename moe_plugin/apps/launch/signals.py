"""Signals that ask a run to end: noted when they come, obeyed where the run can be continued later."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

# Preemption and time limits (SLURM sends SIGTERM, submitit SIGUSR2), Ctrl-C, a closed terminal.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# "Temporary failure, try again" of sysexits.h: the run was stopped by a signal and can continue from its checkpoint.
STOPPED = os.EX_TEMPFAIL


class StopSignals:
    """Notes stop signals within its block; afterwards hands them on to whoever handled them before.

    A signal ends the program at once unless it is deferred: then it waits in `received` for a step boundary. A
    second Ctrl-C always ends the program. What the shell makes us ignore (``nohup``) stays ignored.

    Attributes:
        received: Number of the last stop signal; 0 before any.
        deferred: Whether signals wait, because there is something to save.
    """

    def __init__(self) -> None:
        """Handle nothing yet."""
        self.received = 0
        self.deferred = False
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> StopSignals:
        """Take over the signals; only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return self
        handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self._before = {n: handler for n, handler in handlers.items() if handler is not signal.SIG_IGN}
        for number in self._before:
            signal.signal(number, self.note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back; a launcher such as submitit then does its part for the one that came."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        before = self._before.get(self.received)
        if callable(before) and before is not signal.default_int_handler:
            before(self.received, None)

    def note(self, signum: int, _: FrameType | None) -> None:
        """Handle a signal, called as `signal.signal` documents.

        Raises:
            KeyboardInterrupt: At a second Ctrl-C.
            SystemExit: If signals are not deferred; with the exit code that shells give to the signal.
        """
        if signum == signal.SIGINT and self.received == signum:
            raise KeyboardInterrupt
        self.received = signum
        if not self.deferred:
            raise SystemExit(128 + signum)

    @property
    def name(self) -> str:
        """The last signal in words."""
        return signal.Signals(self.received).name
