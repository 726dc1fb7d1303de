"""Measures on several gloo processes of one thread."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(ranks: int, measure: Callable[[Any], Any], settings: object, start_method: str = "spawn") -> Any:
    """Return what `measure(settings)` returns on the first rank; all take the same random turns."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(  # pyright: ignore[reportPrivateImportUsage]
            work, (ranks, folder, measure, settings), nprocs=ranks, start_method=start_method
        )
        return torch.load(Path(folder) / "result")


def work(rank: int, ranks: int, folder: str, measure: Callable[[Any], Any], settings: object) -> None:
    """Run a rank; the first one leaves what was measured in the folder."""
    torch.set_num_threads(1)
    random.seed(0)
    store = dist.FileStore(os.path.join(folder, "store"), ranks)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", rank=rank, world_size=ranks, store=store)
    result = measure(settings)
    if rank == 0:
        torch.save(result, Path(folder) / "result")
    dist.destroy_process_group()
