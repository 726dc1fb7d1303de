"""What each process of a run lets the command that started it know, in memory that they share."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import tempfile
from ctypes import c_bool, c_char, c_double, c_int64
from typing import BinaryIO, ClassVar

SHARED = "MOE_PLUGIN_RANK_STATES"
"""Variable with the file descriptor of the shared memory."""
_TEXT = 1 << 16


class RankState(ctypes.Structure):
    """How far a process is, and how it failed.

    Attributes:
        ticks: Grows as long as the process runs, whatever its main thread waits for.
        moves: Grows with each part of a step or validation batch that the main thread finishes.
        step: Optimizer steps finished.
        slowest: Longest time between two moves, in seconds.
        is_saving: Whether a checkpoint is being saved, which may take longer than any step.
        failed_at: `time.monotonic` of the failure; 0 before any.
        error: A user's error in one line.
        trace: The traceback of an unexpected error.
    """

    _fields_: ClassVar = [
        ("ticks", c_int64),
        ("moves", c_int64),
        ("step", c_int64),
        ("slowest", c_double),
        ("is_saving", c_bool),
        ("failed_at", c_double),
        ("error", c_char * _TEXT),
        ("trace", c_char * _TEXT),
    ]

    def keep_error(self, line: str) -> None:
        """Write down a user's error; the run's folder may be the reason for it, so it is no place for that."""
        self.error = line.encode(errors="replace")[: _TEXT - 1]

    def keep_trace(self, text: str) -> None:
        """Write down the end of a traceback, where the error is."""
        self.trace = text.encode(errors="replace")[1 - _TEXT :]


def shared_states(ranks: int) -> tuple[BinaryIO, ctypes.Array[RankState]]:
    """Return a nameless file that child processes inherit, and the states in it, one for each rank."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 (the processes' memory is as long as they are)
    file.truncate(ranks * ctypes.sizeof(RankState))
    return file, _map(file.fileno(), ranks)


@functools.cache
def own_state() -> RankState:
    """Return this process's state; its own memory if none is shared."""
    if not is_supervised():
        return RankState()
    local_rank = int(os.environ["LOCAL_RANK"])
    return _map(int(os.environ[SHARED]), local_rank + 1)[local_rank]


def is_supervised() -> bool:
    """Return whether our command started this process, and reports how it ends."""
    return SHARED in os.environ


def _map(descriptor: int, ranks: int) -> ctypes.Array[RankState]:
    memory = mmap.mmap(descriptor, ranks * ctypes.sizeof(RankState))
    return (RankState * ranks).from_buffer(memory)
