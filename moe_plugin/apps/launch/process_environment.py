"""What environment variables say about this process, and what child processes inherit."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig

SPINS = "10000"
"""Loops of a waiting thread on a quiet machine, below a millisecond; libgomp's own 300,000 are many."""
_CHOICES = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}


def limit_spinning() -> None:
    """Choose how long OpenMP's threads spin while they wait, unless the user has; call it before torch is imported.

    On a busy machine a spinning thread keeps the thread it waits for from running, which made steps of the demo several
    times as long. On a quiet machine a thread that sleeps wakes up late.
    """
    is_busy = os.getloadavg()[0] >= (os.cpu_count() or 1)
    if not _CHOICES & os.environ.keys():
        os.environ |= {"OMP_WAIT_POLICY": "passive"} if is_busy else {"GOMP_SPINCOUNT": SPINS}


def is_launched() -> bool:
    """Return whether torchrun (ours or the user's) has started this process as one of several."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def is_first_node(config: DictConfig) -> bool:
    """Return whether this is the machine that writes the run's folder; SLURM starts a command on each."""
    return config.trainer.num_nodes == 1 or os.environ.get("SLURM_NODEID", "0") == "0"


@contextmanager
def for_processes(number: int) -> Iterator[None]:
    """Set, within its block, what child processes inherit: their threads, and what this process can import."""
    threads = max(1, (os.cpu_count() or 1) // number)
    before = dict(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
