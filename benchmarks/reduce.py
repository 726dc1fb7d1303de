"""What the update of all biases adds to a training step of 60 layers x 256 experts, on two gloo ranks, in one run.

Each round takes a step of the whole model (forward, backward and DDP's all-reduce of the gradients, no optimizer),
then the update with its one packed all-reduce, then, as the named peer, one all-reduce per layer of the same counts.
Ranks wait for one another before each is timed. Collectives of the update are counted.

    python benchmarks/reduce.py [--rounds 5] [--layers 60] [--experts 256] [--tokens 2048]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from moe_plugin.balance import balance_
from moe_plugin.experts import ExpertShape
from moe_plugin.models import LanguageModel
from moe_plugin.routing import Router, Sigmoid

RANKS, VOCABULARY, LENGTH = 2, 256, 256


class Collectives(TorchDispatchMode):
    """Counts the collectives in its block."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Runs an operation, and counts it if it is a collective."""
        self.count += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def build(options: argparse.Namespace) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(
        vocab_size=VOCABULARY,
        context_length=LENGTH,
        dim=64,
        num_layers=options.layers,
        num_heads=2,
        router=partial(Router, score=Sigmoid(), normalize=True),
        experts=ExpertShape(num_experts=options.experts, top_k=8, hidden_dim=16),
    )


def seconds(action: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def work(rank: int, port: int, options: argparse.Namespace) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    result = measure(options)
    if rank == 0:
        print(json.dumps(result | {"torch": torch.__version__, "cpu": platform.machine(), **vars(options)}))
    dist.destroy_process_group()


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Medians over rounds, and the ratio of each round's update to its own step."""
    model = build(options)
    balanced, replica = balance_(model), DistributedDataParallel(model)
    counts = [torch.zeros(options.experts, dtype=torch.int64) for _ in range(options.layers)]

    def step() -> None:
        tokens_BS = torch.randint(0, VOCABULARY, (options.tokens // LENGTH, LENGTH))
        replica(tokens_BS).float().logsumexp(-1).mean().backward()

    def reduce_each() -> None:
        for count in counts:
            dist.all_reduce(count)

    times: dict[str, list[float]] = {"step": [], "update": [], "reduce_per_layer": []}
    actions = {"step": step, "update": balanced.update, "reduce_per_layer": reduce_each}
    step()  # The first of each warms up.
    with Collectives() as counted:
        balanced.update()
    reduce_each()
    for _ in range(options.rounds):
        model.zero_grad()
        for name, action in actions.items():
            times[name].append(seconds(action))
    ratios = [update / whole for update, whole in zip(times["update"], times["step"], strict=True)]
    peer = [each / update for each, update in zip(times["reduce_per_layer"], times["update"], strict=True)]
    medians = {f"{name}_ms": round(1e3 * statistics.median(values), 2) for name, values in times.items()}
    return medians | {
        "collectives_per_update": counted.count,
        "update_over_step": round(statistics.median(ratios), 5),
        "reduce_per_layer_over_update": round(statistics.median(peer), 3),
    }


def main() -> None:
    """Prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=2048, help="per rank and step; a multiple of 256")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(  # pyright: ignore[reportPrivateImportUsage]
        work, (port, parser.parse_args()), nprocs=RANKS, start_method="fork"
    )


if __name__ == "__main__":
    main()
