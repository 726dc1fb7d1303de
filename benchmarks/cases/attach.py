"""What an attached site adds to the cost of its host's router, in eager mode and compiled.

With ``rate: auto`` one step in `SPREAD_EVERY` also measures the spread of the scores: its cost is spread over the
steps. "ops" is the cost in units of the smallest torch operation, timed in the same run: unlike microseconds it hardly
depends on how busy the machine is. Shape legend: T tokens, D model width, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.row import Row
from benchmarks.turns import Turns, take_turns
from moe_plugin.attach.balance import balance_
from moe_plugin.attach.balanced_model import SPREAD_EVERY
from moe_plugin.attach.site import Site
from moe_plugin.balancing.rules import Sign

D, E, K = 1024, 64, 8
SMALL = torch.zeros(64)


class SoftmaxRouter(nn.Module):
    """Mixtral style: the plugin adds the bias."""

    def __init__(self) -> None:
        """Draw a gate."""
        super().__init__()
        self.num_experts, self.top_k = E, K
        self.weight = nn.Parameter(torch.randn(E, D) / D**0.5)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return gate weights and expert ids (T, K)."""
        scores_TE = nn.functional.linear(x_TD, self.weight).float().softmax(-1)
        weights_TK, ids_TK = torch.topk(scores_TE, self.top_k, dim=-1)
        return weights_TK / weights_TK.sum(-1, keepdim=True), ids_TK


class OwningRouter(SoftmaxRouter):
    """DeepSeek-V3 style: the plugin drives the router's own bias, and only counts."""

    e_score_correction_bias: Tensor

    def __init__(self) -> None:
        """Draw a gate; the bias starts at zero."""
        super().__init__()
        self.register_buffer("e_score_correction_bias", torch.zeros(E))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return gate weights and expert ids (T, K)."""
        scores_TE = nn.functional.linear(x_TD, self.weight).float().sigmoid()
        ids_TK = torch.topk(scores_TE + self.e_score_correction_bias, self.top_k, dim=-1)[1]
        return scores_TE.gather(-1, ids_TK), ids_TK


class Block(nn.Module):
    """A router with experts next to it, which are not run."""

    def __init__(self, router: nn.Module) -> None:
        """Hold this router."""
        super().__init__()
        self.router = router
        self.experts = nn.ModuleList(nn.Identity() for _ in range(E))


def rows(small_rounds: int = 2000, large_rounds: int = 60) -> Iterator[Row]:
    """Yield the cost at 64 tokens (`small_rounds`), where calls dominate, and the ratio at 4,096 (`large_rounds`)."""
    one_op = take_turns({"op": lambda _: SMALL + 1, "nothing": lambda _: None}, small_rounds)
    op_us = one_op.extra_microseconds("op", "nothing")
    for router in (SoftmaxRouter, OwningRouter):
        for mode, rate in (("eager", 0.001), ("eager", "auto"), ("compiled", 0.001)):
            name = f"{router.__name__}, {mode}, rate {rate}"
            host_us, cost_us = measured(router, 64, rate, mode, small_rounds)
            note = f"{host_us:.0f} us; more by {cost_us / op_us:.0f} ops of {op_us:.1f} us"
            yield Row(f"{name}, 64 tokens", cost_us, "router alone", unit="us more", goal=60.0, note=note)
            host_us, cost_us = measured(router, 4096, rate, mode, large_rounds)
            note = f"{cost_us:.0f} us more"
            yield Row(f"{name}, 4096 tokens", 1 + cost_us / host_us, "router alone", goal=1.1, note=note)


def measured(
    router: Callable[[], nn.Module], tokens: int, rate: float | str, mode: str, rounds: int
) -> tuple[float, float]:
    """Return the microseconds of the router alone, and those that attaching adds."""
    plain = router()
    block = Block(copy.deepcopy(plain))
    site = next(iter(balance_(block, Sign(rate=rate)).values()))
    x_TD = torch.randn(tokens, D)
    assert torch.equal(plain(x_TD)[1], block.router(x_TD)[1])
    assert counted(site, tokens)
    attached = block.router
    if mode == "compiled":
        torch.compiler.reset()
        plain, attached = (torch.compile(each, fullgraph=True) for each in (plain, attached))
    sides = {"plain": plain, "attached": attached}

    def turns() -> Turns:
        return take_turns(sides, rounds, fresh=lambda: x_TD, warm_up=rounds // 10)

    each = turns()
    cost_us = each.extra_microseconds("attached", "plain")
    if site.counters.measures_spread:
        site.counters.looks_closely = False
        between_us = turns().extra_microseconds("attached", "plain")
        cost_us = between_us + (cost_us - between_us) / SPREAD_EVERY
    return 1e3 * each.milliseconds("plain"), cost_us


def counted(site: Site, tokens: int) -> bool:
    """Return whether the site saw the call."""
    return int(site.counts.sum()) == tokens * K
