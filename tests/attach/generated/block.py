"""The model of a `RouterSpec`: its steps become methods of a class, so they are there to be read as in any code.

Shape legend: B batch, S sequence, T tokens, D model width, E experts, K experts selected per token, N blocks.
"""

from __future__ import annotations

from functools import cache, partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tests.attach.generated.scoring import CASTS, LOGITS, MASKS, SCORES
from tests.attach.generated.selecting import GATES, MAPS, SELECTS
from tests.attach.generated.sides import EFFECTS, LOOKS, SECONDS
from tests.attach.generated.spec import SECOND_VALUES, RouterSpec


class Names(NamedTuple):
    """How the parts of a block are called."""

    count: str
    k: str
    gate: str
    router: str
    experts: str


NAMES = (
    Names("num_experts", "top_k", "weight", "gate", "experts"),
    Names("n_experts", "k", "wg", "router", "experts"),
    Names("num_local_experts", "num_experts_per_tok", "proj", "gating", "mlps"),
    Names("E", "topk", "gate", "router", "w1"),
)


def steps_of(spec: RouterSpec) -> dict:
    """Return the functions that a spec names."""
    return {
        "logits_of": LOGITS[spec.logits],
        "cast": CASTS[spec.dtype],
        "score": SCORES[spec.score],
        "mask": MASKS[spec.mask],
        "select": SELECTS.get(spec.select),
        "make_map": MAPS.get(spec.select),
        "rank_again": SECONDS[spec.second],
        "look": LOOKS[spec.look],
        "leave": EFFECTS[spec.effect],
    }


class Routing(nn.Module):
    """Base of what routes: the gate, and the order of the steps."""

    spec: RouterSpec
    names: Names

    def make_gate_(self):
        spec, names = self.spec, self.names
        setattr(self, names.count, spec.experts)
        setattr(self, names.k, spec.k)
        gate = nn.Linear(spec.width, spec.experts, bias=spec.weight == "linear with bias")
        nn.init.normal_(gate.weight, std=0.5)
        setattr(self, names.gate, gate.weight if spec.weight == "parameter" else gate)
        if spec.choice_bias:
            self.register_buffer("e_score_correction_bias", torch.zeros(spec.experts))
        if spec.mask == "experts":
            self.register_buffer("is_closed", torch.arange(spec.experts) == spec.seed % spec.experts)

    @property
    def gate_weight(self):
        return getattr(self, self.names.gate)

    def logits(self, x_TD):
        return self.cast(self.logits_of(x_TD))

    def choice(self, scores_TE):
        return self.mask(scores_TE + self.e_score_correction_bias if self.spec.choice_bias else scores_TE)

    def route(self, x_TD):
        """Return gate weights and ids (T, K), or a map of gate weights (T, E) and None."""
        spec = self.spec
        logits_TE = self.logits(x_TD)
        self.leave(logits_TE)
        scores_TE = self.score(logits_TE)
        if self.make_map is not None:
            return self.make_map(scores_TE, spec.k), None
        again = self.rank_again(logits_TE, scores_TE, spec.k) if spec.early else None
        values_TK, ids_TK = self.select(self.choice(scores_TE), spec.k)
        self.look(ids_TK)
        again = again if spec.early else self.rank_again(logits_TE, scores_TE, spec.k)
        if spec.second in SECOND_VALUES:
            values_TK = again
        return GATES[spec.gates](values_TK, ids_TK, scores_TE, logits_TE), ids_TK


class Router(Routing):
    """A router as a module of its own."""

    def __init__(self):
        super().__init__()
        self.make_gate_()

    def forward(self, x_TD):
        return self.route(x_TD)


class Block(Routing):
    """Experts, and a router in it, or as methods of it."""

    def __init__(self, router: type[Router] | None):
        super().__init__()
        spec, names = self.spec, self.names
        if router is None:
            self.make_gate_()
        else:
            setattr(self, names.router, router())
        shape = spec.experts, spec.width, spec.width
        layers = (nn.Linear(spec.width, spec.width, bias=False) for _ in range(spec.experts))
        setattr(
            self,
            names.experts,
            nn.Parameter(torch.randn(shape) / 3) if spec.stacked else nn.ModuleList(layers),
        )

    @property
    def routing(self):
        return self if self.spec.place != "module" else getattr(self, self.names.router)

    def expert(self, number, x_TD):
        experts = getattr(self, self.names.experts)
        return torch.tanh(x_TD @ experts[number] if self.spec.stacked else experts[number](x_TD))

    def forward(self, x):
        x_TD = x.reshape(-1, x.shape[-1])
        gates, ids_TK = self.route(x_TD) if self.spec.place != "module" else self.routing(x_TD)
        gates = gates.to(x_TD.dtype)
        if ids_TK is None:
            return self.weighted(x_TD, gates).view_as(x)
        return getattr(self, f"by_{self.spec.combine}")(x_TD, gates, ids_TK).view_as(x)

    def weighted(self, x_TD, gates_TE):
        return sum(gates_TE[:, e, None] * self.expert(e, x_TD) for e in range(self.spec.experts))

    def by_scatter(self, x_TD, gates_TK, ids_TK):
        empty_TE = x_TD.new_zeros(len(x_TD), self.spec.experts)
        return self.weighted(x_TD, empty_TE.scatter(1, ids_TK, gates_TK))

    def by_one_hot(self, x_TD, gates_TK, ids_TK):
        hot_TKE = functional.one_hot(ids_TK, self.spec.experts).to(x_TD.dtype)
        return self.weighted(x_TD, (hot_TKE * gates_TK.unsqueeze(-1)).sum(1))

    def by_masked(self, x_TD, gates_TK, ids_TK):
        out_TD = torch.zeros_like(x_TD)
        for number in range(self.spec.experts):
            gates_T = (gates_TK * (ids_TK == number)).sum(-1)
            out_TD = out_TD + gates_T.unsqueeze(-1) * self.expert(number, x_TD)
        return out_TD

    def by_loop(self, x_TD, gates_TK, ids_TK):
        out_TD = torch.zeros_like(x_TD)
        for number in range(self.spec.experts):
            token, slot = torch.where(ids_TK == number)
            gate = gates_TK[token, slot].unsqueeze(-1)
            out_TD = out_TD.index_add(0, token, gate * self.expert(number, x_TD[token]))
        return out_TD


class _Lookup:
    """A step that is looked up by name at each call, as in code with a registry of routing functions."""

    def __init__(self, step):
        self.step = step

    def __get__(self, module, kind):
        return None if self.step is None else partial(self.step, module)


@cache
def _classes(spec: RouterSpec) -> tuple[type[Block], type[Router] | None]:
    common = {"spec": spec, "names": NAMES[spec.names]}
    steps = common | steps_of(spec)
    if spec.place == "module":
        return type("MoE", (Block,), common), type("TopRouter", (Router,), steps)
    hidden = {name: _Lookup(step) for name, step in steps_of(spec).items()}
    return type("MoE", (Block,), common | hidden if spec.place == "registry" else steps), None


class Model(nn.Module):
    """Blocks next to each other: each sees the input itself, so an error of one does not change another."""

    def __init__(self, spec: RouterSpec):
        super().__init__()
        torch.manual_seed(spec.seed)
        each = [RouterSpec(width=spec.width)] * spec.neighbour + [spec] * spec.blocks
        self.layers = nn.ModuleList(block(router) for block, router in map(_classes, each))
        self.keeps = {"checkpoint": False, "reentrant checkpoint": True}.get(spec.mode)

    def forward(self, x):
        """Return the outputs of all blocks (N, B, S, D)."""
        if self.keeps is None:
            return torch.stack([layer(x) for layer in self.layers])
        return torch.stack([checkpoint(layer, x, use_reentrant=self.keeps) for layer in self.layers])


def make_inputs(spec: RouterSpec) -> torch.Tensor:
    """Return hidden states (B, S, D)."""
    generator = torch.Generator().manual_seed(spec.seed)
    return torch.randn(2, spec.tokens // 2, spec.width, generator=generator)
