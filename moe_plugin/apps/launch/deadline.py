"""Ends a process that a signal has asked to end but whose main thread doesn't get there.

Python runs handlers in the main thread only, which may wait for ever, in a collective or a store, for a rank that is
gone. So a thread learns of each signal too: Python writes its number into a pipe as it comes.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

# Preemption and time limits (SLURM sends SIGTERM, submitit SIGUSR2), Ctrl-C, a closed terminal.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_TICK, _LONGEST_TICK = 0.25, 1.0


class Deadline:
    """Watches the main thread within its block.

    Attributes:
        limit: Returns how many seconds may pass without a move after a signal.
        moves: Returns a number that changes with each move of the main thread.
        end: Ends the process; takes the signal's number.
    """

    def __init__(
        self, limit: Callable[[], float], moves: Callable[[], int], end: Callable[[int], object]
    ) -> None:
        """Take what to ask and what to do; nothing is watched yet."""
        self.limit, self.moves, self.end = limit, moves, end
        self._left = threading.Event()

    def start(self) -> None:
        """Begin to watch; only a main thread can."""
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._wait, args=(reader,), name="deadline", daemon=True).start()

    def stop(self) -> None:
        """Watch no longer."""
        signal.set_wakeup_fd(self._before)
        self._left.set()
        os.close(self._writer)

    def _wait(self, reader: int) -> None:
        with os.fdopen(reader, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] in STOP_SIGNALS:
                    self._count_down(number[0])

    def _count_down(self, number: int) -> None:
        """End the process unless it gets on; seconds in which it is stopped, as by Ctrl-Z, don't count."""
        seconds, moves, looked = 0.0, self.moves(), time.monotonic()
        while seconds < self.limit():
            if self._left.wait(_TICK):
                return
            now, before = time.monotonic(), looked
            seconds, looked = seconds + min(now - before, _LONGEST_TICK), now
            if moves != (moves := self.moves()):
                seconds = 0.0
        self.end(number)
