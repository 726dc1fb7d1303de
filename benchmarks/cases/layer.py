"""The routed experts compared with transformers' implementations, a loop over experts, and the dense limit.

Forward and backward with all gradients on the same weights, fresh routing each round, equal outputs checked first.
The dense limit is T * K rows through one SwiGLU of the same width; "equal groups" is one batched product over experts
that all have as many rows. In bf16 all tensors are bf16, which is transformers' best; under autocast its `grouped_mm`
computes in fp32. On a GPU, `device=cuda`, it is Triton's kernels over pure torch instead.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.expert_layer import LIMITS, LOOPED, SHAPES, Layer, Shape
from benchmarks.memory import peak_mib
from benchmarks.row import Row
from benchmarks.turns import Turns, take_turns
from moe_plugin.experts.kernels.choice import VARIABLE
from moe_plugin.experts.kernels.dtypes import product_dtype
from moe_plugin.types import Routing


class Goals(NamedTuple):
    """At most this over the dense limit, and over transformers."""

    dense: float
    grouped_mm: float


REHEARSALS = {torch.float32: 0, torch.bfloat16: 6}
GOALS = {
    torch.float32: {"A": Goals(1.03, 0.97), "B": Goals(1.08, 0.88), "C": Goals(1.2, 0.83)},
    torch.bfloat16: {"A": Goals(1.1, 0.92), "B": Goals(1.25, 0.65), "C": Goals(1.5, 0.52)},
}


def rows(rounds: int = 9, tokens: int = 4096, device: str = "cpu") -> Iterator[Row]:
    """Yield every shape over its peers, growth in tokens and experts, and skew; in bf16 too if the CPU has it."""
    if device != "cpu":
        yield from (triton_over_torch(name, tokens, rounds, device) for name in SHAPES)
        return
    for dtype, goal in ((torch.float32, 1.3), (torch.bfloat16, 1.6)):
        if product_dtype(dtype, torch.device("cpu")) == dtype:
            for name in SHAPES:
                yield from beside_peers(name, tokens, dtype, rounds)
            yield growth_in_tokens(dtype, rounds)
            yield growth_in_experts(dtype, rounds, goal)
            yield skew(dtype, rounds, tokens)


def beside_peers(name: str, tokens: int, dtype: torch.dtype, rounds: int) -> Iterator[Row]:
    """Yield ours over each peer."""
    shape = SHAPES[name]
    layer = Layer(shape, tokens, dtype)
    sides = layer.sides(loops=name in LOOPED)
    routing = layer.routing()
    peaks = {side: peak_mib(partial(run, routing)) for side, run in sides.items()}
    title = f"{name}, {short(dtype)}: {shape.experts} experts, top {shape.top_k}, hidden {shape.hidden}"
    goals = GOALS[dtype][name]._asdict()
    # The limits first: they make few kernels, and leave ours where the peers do not.
    for peers in (LIMITS, sides.keys() - LIMITS - {"ours"}):
        turns = take_turns(
            {side: run for side, run in sides.items() if side in {"ours", *peers}},
            rounds,
            fresh=layer.routing,
            agree=layer.give_the_same,
            rehearsals=REHEARSALS[dtype],
        )
        for peer in sorted(peers):
            note = f"peak of the peer {peaks[peer]:.0f} MiB"
            yield turns.row(title, "ours", peer, goal=goals.get(peer), memory_mib=peaks["ours"], note=note)


def triton_over_torch(name: str, tokens: int, rounds: int, device: str) -> Row:
    """Time our experts on a GPU in bf16, with Triton's kernels over pure torch: wall time until the device is done."""
    with torch.device(device):
        layer = Layer(SHAPES[name], tokens, torch.bfloat16)

        def run(kernels: str, routing: Routing) -> torch.Tensor:
            os.environ[VARIABLE] = kernels
            y_TD = layer.ours(routing)
            torch.cuda.synchronize()
            return y_TD

        turns = take_turns(
            {kernels: partial(run, kernels) for kernels in ("triton", "torch")},
            rounds,
            fresh=layer.routing,
            before=torch.cuda.synchronize,
            agree=lambda results: layer.give_the_same({"ours": results["torch"], **results}),
            clock=time.perf_counter,
        )
    return turns.row(f"{name} on {device}, {tokens} tokens, bf16", "triton", "torch")


def growth_in_tokens(dtype: torch.dtype, rounds: int) -> Row:
    """Return the time per token at 32k tokens over that at 2k."""
    few, many = (Layer(SHAPES["B"], tokens, dtype) for tokens in (2048, 32768))
    turns = against(few.ours, many.ours, max(3, rounds // 3), REHEARSALS[dtype], few.routing, many.routing)
    low, median, high = (value / 16 for value in turns.ratio("one", "other"))
    what = f"time per token, 32k tokens over 2k, {short(dtype)}"
    return Row(what, median, "2k tokens", low=low, high=high, goal=1.1)


def growth_in_experts(dtype: torch.dtype, rounds: int, goal: float) -> Row:
    """Return 256 experts over 8 at the same FLOPs."""
    few, many = (Layer(Shape(experts, 8, 64), 4096, dtype) for experts in (8, 256))
    turns = against(few.ours, many.ours, rounds, REHEARSALS[dtype], few.routing, many.routing)
    return turns.row(f"256 experts over 8, top 8, hidden 64, {short(dtype)}", "one", "other", goal=goal)


def skew(dtype: torch.dtype, rounds: int, tokens: int) -> Row:
    """Return a largest load of 7.6 times the mean over a balanced one."""
    layer = Layer(SHAPES["B"], tokens, dtype)
    pull_E = torch.zeros(64).index_fill_(0, torch.arange(8), 0.75)
    pulled = partial(layer.routing, pull_E)
    turns = against(layer.ours, layer.ours, rounds, REHEARSALS[dtype], layer.routing, pulled)
    load_E = layer.routing(pull_E).expert_ids_TK.flatten().bincount(minlength=64)
    worst = load_E.max().item() / load_E.double().mean().item()
    return turns.row(f"B, largest load {worst:.1f} times the mean, {short(dtype)}", "one", "other", goal=1.05)


def against(
    first: Callable,
    second: Callable,
    rounds: int,
    rehearsals: int,
    for_first: Callable[[], Routing],
    for_second: Callable[[], Routing],
) -> Turns:
    """Time the second over the first, as "one" over "other", each with its own routings."""
    sides = {"other": lambda routings: first(routings[0]), "one": lambda routings: second(routings[1])}
    return take_turns(sides, rounds, fresh=lambda: (for_first(), for_second()), rehearsals=rehearsals)


def short(dtype: torch.dtype) -> str:
    """Return the usual name of a dtype."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
