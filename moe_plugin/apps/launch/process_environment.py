"""What environment variables say about this process, and what child processes inherit."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig


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
