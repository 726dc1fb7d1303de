"""Ties a process to its parent: no rank trains on after ``kill -9`` of the command that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

from moe_plugin.apps.launch.rank_state import own_state

SECONDS = 0.5
_SET_DEATH_SIGNAL = 1
"""``PR_SET_PDEATHSIG`` of Linux's ``prctl``."""


def end_with_parent(parent: int) -> None:
    """Let this process end as soon as its parent has; it also ticks from now on.

    Linux kills even a process that is stopped or holds Python's lock. Elsewhere, and for a parent that was gone
    before we asked, a thread looks who the parent is.

    Args:
        parent: Process id of the parent, which knows it before it starts us.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    threading.Thread(target=_tick, args=(parent,), name="lifeline", daemon=True).start()


def _tick(parent: int) -> None:
    state = own_state()
    while os.getppid() == parent:
        state.ticks += 1
        time.sleep(SECONDS)
    os._exit(os.EX_UNAVAILABLE)
