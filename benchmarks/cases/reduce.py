"""What the update of all biases adds to a training step of 60 layers x 256 experts, on two gloo ranks.

Each round takes a step of the whole model (forward, backward and DDP's all-reduce of the gradients, no optimizer),
then the update with its one packed all-reduce, then, as the named peer, one all-reduce per layer of the same counts.
Ranks wait for one another before each is timed, by wall time. Collectives of the update are counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.models import LENGTH, small_model
from benchmarks.ranks import on_ranks
from benchmarks.row import Row
from benchmarks.turns import Turns, take_turns
from moe_plugin.apps.models import LanguageModel
from moe_plugin.attach.balance import balance_
from moe_plugin.experts import ExpertShape

RANKS = 2


class Sizes(NamedTuple):
    """Of the model and its batch; tokens are per rank and step, a multiple of 256."""

    rounds: int
    layers: int
    experts: int
    tokens: int


class Collectives(TorchDispatchMode):
    """Counts the collectives in its block."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Run an operation, and count it if it is a collective."""
        self.count += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def rows(rounds: int = 5, layers: int = 60, experts: int = 256, tokens: int = 2048) -> Iterator[Row]:
    """Yield the update over the step, and one all-reduce per layer over the update."""
    sizes = Sizes(rounds, layers, experts, tokens)
    seconds, collectives = on_ranks(RANKS, measure, sizes, start_method="fork")
    turns = Turns(seconds)
    yield turns.row("update of all biases", "update", "step", note="forward, backward, gradient all-reduce")
    yield turns.row("one all-reduce per layer", "reduce_per_layer", "update", note="packed in one")
    yield Row("collectives of an update", collectives, "", unit="", goal=1)


def measure(sizes: Sizes) -> tuple[dict[str, list[float]], int]:
    """Return the wall seconds of each side, and the collectives of an update."""
    model = build(sizes)
    balanced, replica = balance_(model), DistributedDataParallel(model)
    counts = [torch.zeros(sizes.experts, dtype=torch.int64) for _ in range(sizes.layers)]

    def step(_: object) -> None:
        tokens_BS = torch.randint(0, 256, (sizes.tokens // LENGTH, LENGTH))
        replica(tokens_BS).float().logsumexp(-1).mean().backward()

    def reduce_each(_: object) -> None:
        for count in counts:
            dist.all_reduce(count)

    sides = {"step": step, "update": lambda _: balanced.update(), "reduce_per_layer": reduce_each}
    step(None)
    with Collectives() as counted:
        balanced.update()
    turns = take_turns(
        sides,
        sizes.rounds,
        fresh=lambda: model.zero_grad(),
        before=dist.barrier,
        warm_up=1,
        clock=time.perf_counter,
    )
    return dict(turns.seconds), counted.count


def build(sizes: Sizes) -> LanguageModel:
    """Return a model of many narrow layers of many experts."""
    experts = ExpertShape(num_experts=sizes.experts, top_k=8, hidden_dim=16)
    return small_model(dim=64, num_layers=sizes.layers, num_heads=2, num_dense=0, experts=experts)
