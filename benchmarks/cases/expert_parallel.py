"""Expert parallelism over two processes of one thread against one process of two threads.

Both train the `small` model on the same batches from the same weights, and take turns: one computes while the other
waits. Equal losses are checked. Memory is the most that a process had resident, less what it had after its imports.
"work" compares processor time, all processes together: with single_threads=1 it shows on a busy machine what expert
parallelism costs in addition to the waiting.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.apart import Apart, apart, call
from benchmarks.memory import resident
from benchmarks.models import random_tokens, small_model
from benchmarks.row import Row
from benchmarks.turns import Turns, take_turns
from moe_plugin.apps.models.clipping import clip_gradients_
from moe_plugin.sharding import materialize_, shard_


def rows(rounds: int = 12, batch: int = 16, single_threads: int = 2) -> Iterator[Row]:
    """Yield wall time, processor time and memory over the single process's; `batch` is over all processes."""
    with (
        tempfile.TemporaryDirectory() as folder,
        apart(ranks(1, folder), threads=single_threads) as single,
        apart(ranks(2, folder), threads=1) as both,
    ):
        sides = {"single": list(single.values()), "expert_parallel": list(both.values())}
        work: dict[str, list[float]] = {name: [] for name in sides}
        turns = take_turns(
            {name: asking(processes, work[name]) for name, processes in sides.items()},
            rounds,
            fresh=lambda: random_tokens(batch),
            agree=losses_are_equal,
            clock=time.perf_counter,
        )
        memory = {name: max(ask(processes, leave, None)) / 2**20 for name, processes in sides.items()}
    peer = f"one process of {single_threads} threads"
    note = "goal: 0.8 of the tokens per second"
    memory_mib = memory["expert_parallel"]
    yield Row(
        **{**vars(turns.row("wall time", "expert_parallel", "single", goal=1.25, note=note)), "peer": peer}
    )
    worked = Turns({name: seconds[-rounds:] for name, seconds in work.items()})
    yield Row(**{**vars(worked.row("work", "expert_parallel", "single")), "peer": peer})
    yield Row("peak memory of a rank", memory_mib / memory["single"], peer, goal=0.6, memory_mib=memory_mib)


def training_step(expert_parallel_size: int) -> Callable[[torch.Tensor], float]:
    """Return an optimizer step on this process's share of a batch."""
    with torch.device("meta"):
        model = small_model()
    torch.manual_seed(0)
    if expert_parallel_size > 1:
        mesh = init_device_mesh("cpu", (expert_parallel_size,))
        shard_(model.network, mesh, expert_parallel_size=expert_parallel_size)
    materialize_(model.network, torch.device("cpu"))
    optimizer = model.optimizer.optimizer(model.parameters(), fused=True)

    def step(tokens: torch.Tensor) -> float:
        loss, _ = model._losses({"tokens": tokens})
        loss.backward()
        clip_gradients_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


class Rank:
    """One of the processes that share a model: its loss for each batch that all of them get."""

    def __init__(self, rank: int, size: int, folder: str) -> None:
        """Join the others, and build this rank's share of the model."""
        self.rank, self.size = rank, size
        if size > 1:
            store = dist.FileStore(os.path.join(folder, "store"), size)  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group("gloo", rank=rank, world_size=size, store=store)
        self.before = resident("VmRSS")
        self.step = training_step(size)

    def __call__(self, tokens: torch.Tensor) -> float:
        """Take a step on this rank's share of a batch."""
        return self.step(tokens.chunk(self.size)[self.rank])


def leave(rank: Rank, _: None) -> int:
    """Return a process's peak resident memory less what it had before its model; must be the last action."""
    if rank.size > 1:
        dist.destroy_process_group()
    return resident("VmHWM") - rank.before


def ranks(size: int, folder: str) -> dict[int, Callable[[], Rank]]:
    """Return what builds each rank."""
    return {rank: partial(Rank, rank, size, folder) for rank in range(size)}


def ask(processes: Sequence[Apart], action: Callable[[Any, Any], Any], given: object) -> list[Any]:
    """Return the answers of processes that work at the same time."""
    for process in processes:
        process.tell(action, given)
    return [process.answer() for process in processes]


def asking(processes: Sequence[Apart], work: list[float]) -> Callable[[torch.Tensor], float]:
    """Return the step of one side, which returns its loss and adds its processor seconds to `work`."""

    def step(tokens: torch.Tensor) -> float:
        before = sum(process.seconds for process in processes)
        loss = statistics.mean(ask(processes, call, tokens))
        work.append(sum(process.seconds for process in processes) - before)
        return loss

    return step


def losses_are_equal(losses: Mapping[str, float]) -> bool:
    """Return whether losses are equal up to the rounding of sums in another order."""
    return abs(losses["single"] - losses["expert_parallel"]) < 1e-3
