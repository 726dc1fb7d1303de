"""The routed experts beside transformers' implementations, a loop over experts, and the dense limit.

Forward and backward with all gradients on the same weights, fresh routing each round, equal outputs checked first.
The dense limit is T * K rows through one SwiGLU of the same width; "equal groups" is one batched product over experts
that all have as many rows. Shape legend: T tokens, D model width, H hidden width, E experts, K experts selected per
token, P = T * K pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.memory import peak_mib
from benchmarks.row import Row
from benchmarks.turns import Turns, take_turns
from moe_plugin.experts import GroupedExperts
from moe_plugin.types import Routing

D = 256


class Shape(NamedTuple):
    """Of a layer: experts, experts per token, hidden width; and the goals over the dense limit and transformers."""

    experts: int
    top_k: int
    hidden: int
    over_dense: float | None = None
    over_transformers: float | None = None


SHAPES = {
    "A": Shape(8, 2, 512, 1.03, 0.97),
    "B": Shape(64, 8, 128, 1.08, 0.88),
    "C": Shape(256, 8, 64, 1.2, 0.83),
}
LOOPED = {"A", "B"}
"""Shapes that a loop over experts finishes in reasonable time."""


def rows(rounds: int = 9, tokens: int = 4096) -> Iterator[Row]:
    """Every shape against its peers, then growth in tokens and experts, and skew."""
    for name, shape in SHAPES.items():
        layer = Layer(shape, tokens)
        sides = layer.sides(loops=name in LOOPED)
        turns = take_turns(sides, rounds, fresh=layer.routing, agree=give_the_same)
        routing = layer.routing()
        peaks = {side: peak_mib(partial(run, routing)) for side, run in sides.items()}
        title = f"{name}: {shape.experts} experts, top {shape.top_k}, hidden {shape.hidden}, {tokens} tokens"
        goals = {"dense": shape.over_dense, "grouped_mm": shape.over_transformers}
        for peer in sides:
            if peer != "ours":
                note = f"peak of the peer {peaks[peer]:.0f} MiB"
                yield turns.row(
                    title, "ours", peer, goal=goals.get(peer), memory_mib=peaks["ours"], note=note
                )
    yield from growth(rounds)
    yield skew(rounds, tokens)


def growth(rounds: int) -> Iterator[Row]:
    """Time per token from 2k to 32k tokens, and from 8 to 256 experts at the same FLOPs."""
    few, many = Layer(SHAPES["B"], 2048), Layer(SHAPES["B"], 32768)
    turns = against(few.ours, many.ours, max(3, rounds // 3), few.routing, many.routing)
    low, median, high = (value / 16 for value in turns.ratio("one", "other"))
    yield Row("time per token, 32k tokens over 2k", median, "2k tokens", low=low, high=high, goal=1.1)
    eight, most = (Layer(Shape(experts, 8, 64), 4096) for experts in (8, 256))
    turns = against(eight.ours, most.ours, rounds, eight.routing, most.routing)
    yield turns.row("256 experts over 8, top 8, hidden 64", "one", "other", goal=1.3)


def skew(rounds: int, tokens: int) -> Row:
    """A largest load of 7.6 times the mean over a balanced one."""
    layer = Layer(SHAPES["B"], tokens)
    pull_E = torch.zeros(64).index_fill_(0, torch.arange(8), 0.75)
    turns = against(layer.ours, layer.ours, rounds, layer.routing, lambda: layer.routing(pull_E))
    load_E = layer.routing(pull_E).expert_ids_TK.flatten().bincount(minlength=64)
    worst = load_E.max().item() / load_E.double().mean().item()
    return turns.row(f"B, largest load {worst:.1f} times the mean", "one", "other", goal=1.05)


def against(
    first: Callable, second: Callable, rounds: int, for_first: Callable[[], Routing], for_second: Callable
) -> Turns:
    """The second over the first, as "one" over "other", each with routings of its own."""
    sides = {"other": lambda routings: first(routings[0]), "one": lambda routings: second(routings[1])}
    return take_turns(sides, rounds, fresh=lambda: (for_first(), for_second()))


class Layer:
    """One shape with its weights in every layout, and hidden states."""

    def __init__(self, shape: Shape, tokens: int) -> None:
        """Draws them."""
        self.shape = shape
        self.experts = GroupedExperts(shape.experts, D, shape.hidden)
        self.x_TD = torch.randn(tokens, D, requires_grad=True)
        self.gradient_TD = torch.randn(tokens, D)
        self.dense = nn.ParameterList(
            [torch.randn(D, 2 * shape.hidden) / D**0.5, torch.randn(shape.hidden, D) / shape.hidden**0.5]
        )
        self.x_PD = torch.randn(tokens * shape.top_k, D, requires_grad=True)

    def routing(self, pull_E: Tensor | float = 0.0) -> Routing:
        """Random routing, drawn towards experts with a pull."""
        scores_TE = torch.rand(len(self.x_TD), self.shape.experts)
        ids_TK = (scores_TE + pull_E).topk(self.shape.top_k).indices
        weights_TK = scores_TE.gather(1, ids_TK).requires_grad_()
        return Routing(weights_TK, ids_TK, scores_TE)

    def sides(self, *, loops: bool) -> dict[str, Callable[[Routing], Tensor]]:
        """What is timed, by name."""
        sides = {"ours": self.ours, "dense": self.dense_limit, "equal groups": self.equal_groups}
        for implementation in ("grouped_mm", *(("eager",) if loops else ())):
            sides[implementation] = self.transformers(implementation)
        if loops:
            sides["loop"] = self.loop
        return sides

    def ours(self, routing: Routing) -> Tensor:
        """Our experts."""
        return self._step(
            self.experts(self.x_TD, routing), [self.x_TD, routing.weights_TK, *self.experts.parameters()]
        )

    def dense_limit(self, _: Routing) -> Tensor:
        """One SwiGLU over as many rows."""
        gate_PH, up_PH = (self.x_PD @ self.dense[0]).chunk(2, -1)
        y_PD = (functional.silu(gate_PH) * up_PH) @ self.dense[1]
        y_PD.backward(self.gradient_TD.repeat_interleave(self.shape.top_k, 0))
        self._forget([self.x_PD, *self.dense])
        return y_PD.detach()

    def equal_groups(self, _: Routing) -> Tensor:
        """One batched product over experts with equally many rows, already sorted."""
        x_END = self.x_PD.view(self.shape.experts, -1, D)
        gate_ENH, up_ENH = torch.bmm(x_END, self.experts.gate_up).chunk(2, -1)
        y_END = torch.bmm(functional.silu(gate_ENH) * up_ENH, self.experts.down)
        y_END.backward(self.gradient_TD.repeat_interleave(self.shape.top_k, 0).view_as(y_END))
        self._forget([self.x_PD, *self.experts.parameters()])
        return y_END.detach()

    def loop(self, routing: Routing) -> Tensor:
        """Expert by expert, on the tokens that chose it."""
        y_TD = torch.zeros_like(self.x_TD)
        projections = zip(self.experts.gate_up.unbind(0), self.experts.down.unbind(0), strict=True)
        for expert, (gate_up, down) in enumerate(projections):
            tokens_N, slots_N = (routing.expert_ids_TK == expert).nonzero(as_tuple=True)
            gate_NH, up_NH = (self.x_TD[tokens_N] @ gate_up).chunk(2, -1)
            y_ND = (functional.silu(gate_NH) * up_NH) @ down
            y_TD = y_TD.index_add(0, tokens_N, y_ND * routing.weights_TK[tokens_N, slots_N, None])
        return self._step(y_TD, [self.x_TD, routing.weights_TK, *self.experts.parameters()])

    def transformers(self, implementation: str) -> Callable[[Routing], Tensor]:
        """Qwen3-MoE's experts on the same weights."""
        shape = self.shape
        config = Qwen3MoeConfig(
            hidden_size=D, num_experts=shape.experts, moe_intermediate_size=shape.hidden, hidden_act="silu"
        )
        config._experts_implementation = implementation
        experts = Qwen3MoeExperts(config)
        with torch.no_grad():
            experts.get_parameter("gate_up_proj").copy_(self.experts.gate_up.mT)
            experts.get_parameter("down_proj").copy_(self.experts.down.mT)

        def run(routing: Routing) -> Tensor:
            y_TD = experts(self.x_TD, routing.expert_ids_TK, routing.weights_TK)
            return self._step(y_TD, [self.x_TD, routing.weights_TK, *experts.parameters()])

        return run

    def _step(self, y_TD: Tensor, trained: list[Tensor]) -> Tensor:
        y_TD.backward(self.gradient_TD)
        self._forget(trained)
        return y_TD.detach()

    @staticmethod
    def _forget(trained: list[Tensor]) -> None:
        for tensor in trained:
            tensor.grad = None


def give_the_same(results: Mapping[str, Tensor]) -> bool:
    """Whether all that compute the routed sum agree to fp32 rounding."""
    ours = results["ours"]
    others = [y for name, y in results.items() if name not in ("dense", "equal groups")]
    return all(torch.allclose(ours, y, atol=2e-4, rtol=1e-3) for y in others)
