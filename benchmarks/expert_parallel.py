"""Expert parallelism over two processes of one thread against one process of two threads, paired in one run.

Both train the model of conf/model/small.yaml on the same batches from the same weights, and take turns: one computes
while the other waits. Equal losses are checked. Memory is the most that a process had resident, less what it had after
its imports. `work_ratio` compares processor time, all processes together: with --threads 1 it tells on a busy machine
what expert parallelism costs beside the waiting.

    python benchmarks/expert_parallel.py [--rounds 12] [--batch 16] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moe_plugin.experts import ExpertShape
from moe_plugin.models import LanguageModel
from moe_plugin.models.clipping import clip_gradients_
from moe_plugin.routing import Router, Sigmoid
from moe_plugin.sharding import materialize_, shard_

VOCABULARY, LENGTH, WARM_UP = 256, 256, 2


def small_model() -> LanguageModel:
    """The model of conf/model/small.yaml with conf/experts/16.yaml, without storage."""
    with torch.device("meta"):
        return LanguageModel(
            vocab_size=VOCABULARY,
            context_length=LENGTH,
            dim=384,
            num_layers=8,
            num_heads=6,
            num_dense=1,
            router=partial(Router, score=Sigmoid(), normalize=True),
            experts=ExpertShape(num_experts=16, top_k=2, hidden_dim=128),
        )


def training_step(expert_parallel_size: int) -> Callable[[torch.Tensor], float]:
    """A whole optimizer step on this process's share of a batch."""
    torch.manual_seed(0)
    model = small_model()
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


def resident(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most so far."""
    status = Path("/proc/self/status").read_text()
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def work(pipe: Connection, rank: int, size: int, port: int, threads: int) -> None:
    """A process: a loss for each batch that it is sent, and its memory when there are no more."""
    torch.set_num_threads(threads)
    if size > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=rank, world_size=size)
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


def start(size: int, threads: int) -> list[Connection]:
    """Starts the processes that share a model, and waits until they have it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context, pipes = get_context("spawn"), []
    for rank in range(size):
        ours, theirs = context.Pipe()
        context.Process(target=work, args=(theirs, rank, size, port, threads), daemon=True).start()
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()
    return pipes


def ask(pipes: Sequence[Connection], message: torch.Tensor | None) -> list[Any]:
    """The answers of the processes."""
    for pipe in pipes:
        pipe.send(message)
    return [pipe.recv() for pipe in pipes]


def take_turns(sides: dict[str, list[Connection]], rounds: int, batch: int) -> dict[str, list[float]]:
    """Wall and processor seconds of each step of both sides, in pairs."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for turn in range(rounds + WARM_UP):
        tokens, losses = torch.randint(0, VOCABULARY, (batch, LENGTH + 1)), {}
        for name in random.sample(sorted(sides), len(sides)):
            begin = time.perf_counter()
            answers = ask(sides[name], tokens)
            losses[name] = statistics.mean(loss for loss, _ in answers)
            if turn >= WARM_UP:
                seconds[f"{name}_wall_s"].append(time.perf_counter() - begin)
                seconds[f"{name}_work_s"].append(sum(work for _, work in answers))
        assert abs(losses["single"] - losses["expert_parallel"]) < 1e-3, losses
    return seconds


def measure(rounds: int, batch: int, threads: int) -> dict[str, float]:
    """Ratios of expert parallel to single: of tokens per second, of work, and of memory per process."""
    sides = {"single": start(1, threads), "expert_parallel": start(2, 1)}
    seconds = take_turns(sides, rounds, batch)
    result = {name: statistics.median(values) for name, values in seconds.items()}
    for kind in ("wall", "work"):
        pairs = zip(seconds[f"single_{kind}_s"], seconds[f"expert_parallel_{kind}_s"], strict=True)
        quartiles = statistics.quantiles([single / parallel for single, parallel in pairs], n=4)
        result |= {
            f"{kind}_ratio{suffix}": q for suffix, q in zip(("_q1", "", "_q3"), quartiles, strict=True)
        }
    memory = {f"{name}_mib": max(ask(pipes, None)) / 2**20 for name, pipes in sides.items()}
    return result | memory | {"memory_ratio": memory["expert_parallel_mib"] / memory["single_mib"]}


def main() -> None:
    """Prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16, help="sequences of 256 tokens over all processes")
    parser.add_argument("--threads", type=int, default=2, help="of the single process")
    options = parser.parse_args()
    random.seed(0)
    result = measure(options.rounds, options.batch, options.threads)
    machine = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__, **vars(options)}
    machine["load"] = os.getloadavg()[0]
    print(json.dumps({key: round(value, 4) for key, value in result.items()} | machine))


if __name__ == "__main__":
    main()
