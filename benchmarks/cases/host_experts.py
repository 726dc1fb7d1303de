"""Qwen3-MoE of transformers with `balance_(experts="fused")` compared with the same with its own experts.

First its MoE block, forward and backward with all gradients, then a whole training step of the small model as Qwen3.
Same weights, equal outputs or losses checked in every round; both sides are watched by `balance_(rule=None)`, so only
the experts differ. Peers of the block are `grouped_mm` and, if it ends in reasonable time, `eager`;
the peer of the step is the faster one.

Shape legend: T tokens, D model width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.cases.train_step import (
    IMPLEMENTATIONS,
    PRECISIONS,
    Step,
    logits_of,
    over_best_peer,
    softmax_model,
    training_step,
)
from benchmarks.expert_layer import LOOPED, SHAPES, D, Shape
from benchmarks.memory import peak_mib
from benchmarks.qwen3 import as_qwen3, qwen3_block
from benchmarks.row import Row
from benchmarks.turns import take_turns
from moe_plugin import balance_


def rows(rounds: int = 9, tokens: int = 4096, batch: int = 4) -> Iterator[Row]:
    """Yield every shape of the block, then the step; `batch` is sequences of 256 tokens."""
    for name, shape in SHAPES.items():
        peers = IMPLEMENTATIONS if name in LOOPED else ("grouped_mm",)
        yield from block(f"{name}: {shape.experts} experts, top {shape.top_k}", shape, peers, rounds, tokens)
    for precision in PRECISIONS:
        yield whole_step(precision, rounds, batch)


def block(title: str, shape: Shape, peers: Sequence[str], rounds: int, tokens: int) -> Iterator[Row]:
    """Yield the block with fused experts over each of the host's implementations."""
    hosts = {name: host_block(shape, name) for name in peers}
    fused = copy.deepcopy(hosts["grouped_mm"])
    sides = {name: running(host) for name, host in with_own(fused, hosts).items()}
    turns = take_turns(sides, rounds, fresh=partial(torch.randn, 1, tokens, D), agree=give_the_same)
    x_1TD = torch.randn(1, tokens, D)
    peaks = {name: peak_mib(partial(run, x_1TD)) for name, run in sides.items()}
    for peer in hosts:
        note = f"peak of the peer {peaks[peer]:.0f} MiB"
        yield turns.row(f"block {title}, fp32", "fused", peer, memory_mib=peaks["fused"], note=note)


def whole_step(precision: str, rounds: int, batch: int) -> Row:
    """Return the row of a model's training step."""
    sides = {"fused": partial(host_step, IMPLEMENTATIONS[0], "fused", precision)}
    sides |= {name: partial(host_step, name, None, precision) for name in IMPLEMENTATIONS}
    return over_best_peer("step of small as Qwen3", sides, precision, rounds, batch)


def host_step(implementation: str, experts: Literal["fused"] | None, precision: str) -> Step:
    """Return the training step of one side."""
    model = as_qwen3(softmax_model(), implementation)
    balance_(model, rule=None, experts=experts)
    return training_step(model, partial(logits_of, model), precision)


def with_own(fused: nn.Module, hosts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return all sides, watched alike."""
    balance_(fused, rule=None, experts="fused")
    for host in hosts.values():
        balance_(host, rule=None)
    return {"fused": fused, **hosts}


def host_block(shape: Shape, implementation: str) -> nn.Module:
    """Return the block of one shape, with the same weights for every implementation."""
    torch.manual_seed(0)
    return qwen3_block(D, shape.experts, shape.top_k, shape.hidden, implementation)


def running(host: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a forward and backward with all gradients, which are then dropped."""

    def run(x_1TD: Tensor) -> Tensor:
        x_1TD = x_1TD.clone().requires_grad_()
        y_1TD = host(x_1TD)
        y_1TD.backward(torch.ones_like(y_1TD))
        host.zero_grad()
        return y_1TD.detach()

    return run


def give_the_same(results: Mapping[str, Tensor]) -> bool:
    """Return whether all sides agree to fp32 rounding."""
    return all(torch.allclose(results["fused"], y, atol=2e-4, rtol=1e-3) for y in results.values())
