"""Whether counted FLOPs are saved: the time of routers with different numbers of experts per token over fixed top-2.

Each step is forward, backward and the update of bias and level, all on the same expert weights and fresh random tokens
each round. The routers are those of conf/router, driven to their mean number before. "FLOPs" is that of `measure`, for
the number of experts that the timed steps used. Hosts are Qwen3-MoE's layer with our router in it. Shape legend: T
tokens, D model width.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from benchmarks.qwen3 import qwen3_block
from benchmarks.row import Row
from benchmarks.turns import take_turns
from moe_plugin.apps.launch.compose import conf_dir
from moe_plugin.apps.models.hugging_face import replace_routers_
from moe_plugin.apps.models.language_model import moe_block
from moe_plugin.apps.models.size import measure
from moe_plugin.attach.balance import balance_
from moe_plugin.experts import ExpertShape

EXPERTS = 16
MEANS = (1.0, 1.5, 2.0, 4.0)
PEER = "sigmoid_top_k, 2"
DRIVING_STEPS = 400


class Size(NamedTuple):
    """Of a layer: model width, hidden width of an expert, tokens."""

    dim: int
    hidden: int
    tokens: int

    def random_tokens(self) -> Tensor:
        """Return hidden states (1, T, D)."""
        return torch.randn(1, self.tokens, self.dim)


class Side:
    """A balanced layer whose steps are timed."""

    def __init__(
        self, layer: nn.Module, router: nn.Module, size: Size, experts: Literal["fused"] | None = None
    ) -> None:
        """Drive bias and level to where they stay."""
        self.layer = layer
        self.size = measure(layer)
        self.balanced = balance_(layer, experts=experts)
        self.used: list[float] = []
        layer(size.random_tokens())  # The first step asks whether fused experts run at all.
        self.balanced.update()
        for _ in range(DRIVING_STEPS):
            router(size.random_tokens()[0])
            self.balanced.update()

    def __call__(self, x_1TD: Tensor) -> None:
        """Take a training step without optimizer."""
        self.layer.zero_grad()
        y_1TD = self.layer(x_1TD.detach().requires_grad_())
        y_1TD.backward(x_1TD)
        record = self.balanced.update()
        ((counts_E, tokens),) = zip(record.counts.values(), record.tokens.values(), strict=True)
        self.used.append((counts_E.sum() / tokens).item())

    def mean_k(self, rounds: int) -> float:
        """Return the experts per token in the last rounds."""
        return statistics.fmean(self.used[-rounds:])

    def flops(self, rounds: int) -> float:
        """Return the counted operations per token of a forward in the last rounds."""
        return self.size.active_flops(self.mean_k(rounds))


def rows(rounds: int = 12, tokens: int = 4096, dim: int = 256, hidden: int = 512) -> Iterator[Row]:
    """Yield our layer with each router at each mean number, then hosts with top-p."""
    size = Size(dim, hidden, tokens)
    yield from compare(our_sides(size), rounds, size)
    for implementation in ("eager", "grouped_mm", "fused"):
        yield from compare(host_sides(size, implementation), rounds, size, f"host, {implementation}: ")


def compare(sides: Mapping[str, Side], rounds: int, size: Size, prefix: str = "") -> Iterator[Row]:
    """Yield each side over fixed top-2."""
    turns = take_turns(sides, rounds, fresh=size.random_tokens)
    peer_flops = sides[PEER].flops(rounds)
    for name, side in sides.items():
        if name != PEER:
            note = f"mean {side.mean_k(rounds):.2f}, FLOPs {side.flops(rounds) / peer_flops:.2f} x"
            yield turns.row(f"{prefix}{name}", name, PEER, note=note)


def our_sides(size: Size) -> dict[str, Side]:
    """Return our layer with fixed numbers and with varying ones, on the weights of one layer."""
    shape = ExpertShape(EXPERTS, 2, size.hidden)
    sides, experts = {}, None
    for name, router in {**fixed_routers(), **dynamic_routers()}.items():
        layer = moe_block(size.dim, router, shape)
        experts = layer.experts if experts is None else experts
        layer.experts = experts
        sides[name] = Side(layer, layer.router, size)
    return sides


def host_sides(size: Size, implementation: str) -> dict[str, Side]:
    """Return a layer of transformers with fixed numbers and with top-p, on the weights of one layer."""
    sides, experts = {}, None
    top_p = {name: router for name, router in dynamic_routers().items() if name.startswith("top_p")}
    for name, router in {**fixed_routers(8), **top_p}.items():
        fused = "fused" if implementation == "fused" else None
        host = qwen3_block(size.dim, EXPERTS, 2, size.hidden, "eager" if fused else implementation)
        replace_routers_(host, router, ExpertShape(EXPERTS, 2, size.hidden))
        experts = host.experts if experts is None else experts
        # Not the layer itself, which each side may give another forward.
        host.experts._parameters.update(experts._parameters)
        sides[name] = Side(host, host.gate, size, fused)
    return sides


def fixed_routers(*more: int) -> dict[str, partial[Any]]:
    """Return routers with the same number of experts for every token."""
    return {f"sigmoid_top_k, {k}": from_conf("sigmoid_top_k", top_k=k) for k in (1, 2, 4, *more)}


def dynamic_routers() -> dict[str, partial[Any]]:
    """Return routers whose tokens use different numbers of experts, at each mean number."""
    routers = {}
    for mean in MEANS:
        routers[f"top_p, {mean:g}"] = from_conf("top_p", target_k=mean)
        routers[f"threshold, {mean:g}"] = from_conf("threshold", target_k=mean)
        # With four picks a token cannot use four on average while some picks are free.
        routers[f"zero_experts, {mean:g}"] = from_conf(
            "zero_experts", target_k=mean, max_k=8 if mean >= 4 else 4
        )
    return routers


def from_conf(name: str, **settings: float) -> partial[Any]:
    """Return a router of conf/router without its sizes."""
    return partial(instantiate(OmegaConf.load(conf_dir() / "router" / f"{name}.yaml")), **settings)
