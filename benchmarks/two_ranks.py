"""The expert layer with its all-to-all over two gloo processes, one of which gets more rows than the other.

The first rank is the full one. Its processor time is what the step would take with a core for each rank; wall time is
reported too, and means little on a machine with other work. f is the share of its experts in the balanced step. Shape
legend: T tokens of a rank, D model width, K experts selected per token, P = T * K pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.ranks import on_ranks
from benchmarks.row import Row
from benchmarks.turns import Turns, take_turns
from moe_plugin.experts import GroupedExperts
from moe_plugin.experts.parallel import parallelize_experts_
from moe_plugin.types import Routing

RANKS, EXPERTS, TOP_K, D = 2, 16, 2, 256
OWN = EXPERTS // RANKS
VIOLATIONS = {"balanced": 0.0, "MaxVio_rank 0.25": 0.25, "MaxVio_rank 0.5": 0.5, "MaxVio_rank 1": 1.0}
PEER = "balanced"


class Size(NamedTuple):
    """Rounds, tokens of a rank and hidden width of an expert."""

    rounds: int
    tokens: int
    hidden: int


def layer_rows(rounds: int, tokens: int, hidden: int) -> Iterator[Row]:
    """Yield the step at each violation over the balanced one."""
    worked, waited = map(Turns, on_ranks(RANKS, measure, Size(rounds, tokens, hidden)))
    share = worked.ratio("experts", PEER)[1]
    for side, violation in VIOLATIONS.items():
        if side != PEER:
            name = f"all-to-all layer over 2 ranks, {side}"
            note = f"formula with f = {share:.2f}: {1 + share * violation:.2f}"
            yield worked.row(name, side, PEER, note=note)
            yield waited.row(f"{name}, wall", side, PEER, note=note)


def measure(size: Size) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return processor and wall seconds of this rank's steps by violation, and of its experts as "experts"."""
    torch.manual_seed(dist.get_rank())
    layer, own = GroupedExperts(EXPERTS, D, size.hidden), GroupedExperts(OWN, D, size.hidden)
    parallelize_experts_(layer, init_device_mesh("cpu", (RANKS,)))
    wall: dict[str, list[float]] = {}
    sides = {
        name: partial(routed_step, layer, partial(skewed, violation), size.tokens)
        for name, violation in VIOLATIONS.items()
    } | {"experts": partial(routed_step, own, only_own, size.tokens * TOP_K)}
    timed = {name: by_the_clock(side, wall.setdefault(name, [])) for name, side in sides.items()}
    turns = take_turns(timed, size.rounds, before=dist.barrier)
    return dict(turns.seconds), {name: seconds[-size.rounds :] for name, seconds in wall.items()}


def by_the_clock(side: Callable[[], None], seconds: list[float]) -> Callable[[object], None]:
    """Return the side as `take_turns` calls it, made to add its wall seconds to a list."""

    def run(_: object) -> None:
        begin = time.perf_counter()
        side()
        seconds.append(time.perf_counter() - begin)

    return run


def routed_step(experts: GroupedExperts, route: Callable[[int], Tensor], tokens: int) -> None:
    """Take a step of so many tokens, routing included."""
    step(experts, route(tokens))


def step(experts: GroupedExperts, ids_TK: Tensor) -> None:
    """Run forward and backward on fresh hidden states, all gate weights one."""
    x_TD = torch.randn(len(ids_TK), D, requires_grad=True)
    ones_TK = torch.ones(ids_TK.shape)
    experts.zero_grad()
    y_TD = experts(x_TD, Routing(ones_TK, ids_TK, scores_TE=ones_TK))
    y_TD.backward(x_TD.detach())


def skewed(violation: float, tokens: int) -> Tensor:
    """Return expert ids (T, K): the first rank gets ``1 + violation`` times its share, each equally often."""
    ids_P = torch.randint(0, OWN, (tokens * TOP_K,))
    others_P = torch.randperm(len(ids_P))[round(len(ids_P) * (1 + violation) / RANKS) :]
    ids_P[others_P] += OWN
    return ids_P.view(-1, TOP_K)


def only_own(pairs: int) -> Tensor:
    """Return ids (P, 1) of a rank's own experts."""
    return torch.randint(0, OWN, (pairs, 1))
