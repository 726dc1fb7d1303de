"""Starts the processes of a run on this machine, looks after them, and ends all when one fails or hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from moe_plugin.apps.launch.deadline import STOP_SIGNALS
from moe_plugin.apps.launch.rank_state import SHARED, RankState, shared_states

LOOK = 0.1
"""Seconds between two looks at the processes."""
LONGEST_LOOK = 1.0
"""More seconds have not passed for the processes either."""
LEAVING = 3.0
"""Seconds in which the others end when one has failed: nothing can be saved without it."""
SAVED = 10.0
"""The same when one has ended after all saved together."""


class Rank:
    """One process: what it says of itself, and for how long it has said nothing."""

    def __init__(self, number: int, process: subprocess.Popen[bytes], state: RankState) -> None:
        """Take a process that has just been started.

        Args:
            number: Its rank among all processes of the run.
            process: The process.
            state: Its memory.
        """
        self.number, self.process, self.state = number, process, state
        self.stopped = self.idle = 0.0
        self._seen = (0, 0)

    def look(self, seconds: float) -> None:
        """Count the seconds since its last tick and its last move, another look having been so long ago."""
        ticks, moves = self._seen
        self._seen = (self.state.ticks, self.state.moves)
        self.stopped = 0.0 if ticks != self._seen[0] or not ticks else self.stopped + seconds
        is_moving = moves != self._seen[1] or not moves or self.state.is_saving
        self.idle = 0.0 if is_moving else self.idle + seconds

    @property
    def code(self) -> int | None:
        """The exit code; minus the signal's number if one killed it; None while it runs."""
        return self.process.poll()

    @property
    def where(self) -> str:
        """The step it is in, in words."""
        return f"in step {self.state.step + 1}" if self.state.moves else "before the first step"


class Ranks:
    """The processes of a run on this machine; none is left after the block.

    Attributes:
        all: One `Rank` each.
    """

    def __init__(self, arguments: Sequence[str], places: Sequence[Mapping[str, str]]) -> None:
        """Start nothing yet.

        Args:
            arguments: Python's.
            places: Variables by which each process finds the others; among them RANK.
        """
        self._command = [sys.executable, *arguments]
        self._places = places
        self.all: list[Rank] = []
        self._looked = time.monotonic()

    def __enter__(self) -> Ranks:
        """Start them, with signals blocked until they can handle them."""
        file, states = shared_states(len(self._places))
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            for place, state in zip(self._places, states, strict=True):
                shared = {SHARED: str(file.fileno())}
                process = subprocess.Popen(
                    self._command,
                    env={**os.environ, **place, **shared},
                    pass_fds=[file.fileno()],
                    start_new_session=True,  # Ctrl-C reaches only us, and we pass it on
                )
                self.all.append(Rank(int(place["RANK"]), process, state))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            file.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill what still runs."""
        for rank in self.running:
            rank.process.kill()
            rank.process.wait()

    @property
    def running(self) -> list[Rank]:
        """Those that have not ended."""
        return [rank for rank in self.all if rank.code is None]

    def pass_on(self, number: int) -> None:
        """Send a signal to all that run."""
        for rank in self.running:
            rank.process.send_signal(number)

    def look(self) -> None:
        """Wait a moment and look at each; a pause of this process, as by Ctrl-Z, doesn't count."""
        time.sleep(LOOK)
        now, before = time.monotonic(), self._looked
        self._looked = now
        for rank in self.running:
            rank.look(min(now - before, LONGEST_LOOK))

    def end(self, seconds: float) -> None:
        """End all.

        Args:
            seconds: After these they are killed.
        """
        self.pass_on(signal.SIGTERM)
        until = time.monotonic() + seconds
        while self.running and time.monotonic() < until:
            time.sleep(LOOK / 2)
        self.__exit__(None, None, None)

    def stopped(self, seconds: float) -> list[Rank]:
        """Return those in which nothing has run for so long."""
        return [rank for rank in self.running if rank.stopped >= seconds]

    def behind(self, seconds: float) -> list[Rank]:
        """Return those furthest behind if for so long none has moved: the others wait for them."""
        running = self.running
        if not running or any(rank.idle < seconds for rank in running):
            return []
        least = min(rank.state.moves for rank in running)
        return [rank for rank in running if rank.state.moves == least]
