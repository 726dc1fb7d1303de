"""Expert parallelism over two processes of one thread against one process of two threads.

Both train the `small` model on the same batches from the same weights, and take turns: one computes while the other
waits. Equal losses are checked. Memory is the most that a process had resident, less what it had after its imports.
"work" compares processor time, all processes together: with single_threads=1 it tells on a busy machine what expert
parallelism costs beside the waiting.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.memory import resident
from benchmarks.models import random_tokens, small_model
from benchmarks.row import Row
from benchmarks.turns import Turns, take_turns
from moe_plugin.models.clipping import clip_gradients_
from moe_plugin.sharding import materialize_, shard_

Answers = list[tuple[float, float]]
"""Loss and processor seconds of each process of a side."""


def rows(rounds: int = 12, batch: int = 16, single_threads: int = 2) -> Iterator[Row]:
    """Wall time, processor time and memory over those of the single process; `batch` is over all processes."""
    with tempfile.TemporaryDirectory() as folder:
        sides = {"single": start(1, single_threads, folder), "expert_parallel": start(2, 1, folder)}
        work: dict[str, list[float]] = {name: [] for name in sides}
        turns = take_turns(
            {name: asking(pipes, work[name]) for name, pipes in sides.items()},
            rounds,
            fresh=lambda: random_tokens(batch),
            agree=losses_are_equal,
            clock=time.perf_counter,
        )
        memory = {name: max(ask(pipes, None)) / 2**20 for name, pipes in sides.items()}
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
    """A whole optimizer step on this process's share of a batch."""
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


def serve(pipe: Connection, rank: int, size: int, threads: int, folder: str) -> None:
    """A process: a loss for each batch that it is sent, and its memory when there are no more."""
    torch.set_num_threads(threads)
    if size > 1:
        store = dist.FileStore(os.path.join(folder, "store"), size)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", rank=rank, world_size=size, store=store)
    before = resident("VmRSS")
    step = training_step(size)
    pipe.send("ready")
    while (tokens := pipe.recv()) is not None:
        begin = time.process_time()
        loss = step(tokens.chunk(size)[rank])
        pipe.send((loss, time.process_time() - begin))
    pipe.send(resident("VmHWM") - before)
    if size > 1:
        dist.destroy_process_group()


def start(size: int, threads: int, folder: str) -> list[Connection]:
    """Starts the processes that share a model, and waits until they have it."""
    context, pipes = get_context("spawn"), []
    for rank in range(size):
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, rank, size, threads, folder), daemon=True).start()
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()
    return pipes


def ask(pipes: Sequence[Connection], message: torch.Tensor | None) -> list[Any]:
    """The answers of the processes."""
    for pipe in pipes:
        pipe.send(message)
    return [pipe.recv() for pipe in pipes]


def asking(pipes: Sequence[Connection], work: list[float]) -> Callable[[torch.Tensor], float]:
    """A step of one side: its loss; adds its processor seconds to `work`."""

    def step(tokens: torch.Tensor) -> float:
        answers: Answers = ask(pipes, tokens)
        work.append(sum(seconds for _, seconds in answers))
        return statistics.mean(loss for loss, _ in answers)

    return step


def losses_are_equal(losses: Mapping[str, float]) -> bool:
    """Up to the rounding of sums in another order."""
    return abs(losses["single"] - losses["expert_parallel"]) < 1e-3
