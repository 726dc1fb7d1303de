"""What an attached site costs beside its host's router, in eager mode and compiled, on one thread.

    python benchmarks/attach.py [--out attach.json]

Pairs of calls, attached and not, in shuffled order in one run; the cost is the median of the pairs' differences, in
process time. With ``rate: auto`` one step in `SPREAD_EVERY` also measures the spread of the scores: its cost is spread
over the steps. "ops" is the cost in units of the smallest torch operation, timed in the same run: unlike microseconds
it hardly depends on how busy the machine is. Shape legend: T tokens, D model width, E experts.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_plugin.adapters.site import Site
from moe_plugin.balance import balance_
from moe_plugin.balanced import SPREAD_EVERY
from moe_plugin.balancing.rules import Sign

D, E, K = 1024, 64, 8
ROUNDS = {64: 2000, 4096: 60}
SMALL = torch.zeros(64)


class SoftmaxRouter(nn.Module):
    """Mixtral style: the plugin adds the bias."""

    def __init__(self) -> None:
        """Draw a gate."""
        super().__init__()
        self.num_experts, self.top_k = E, K
        self.weight = nn.Parameter(torch.randn(E, D) / D**0.5)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Gate weights and expert ids (T, K)."""
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
        """Gate weights and expert ids (T, K)."""
        scores_TE = nn.functional.linear(x_TD, self.weight).float().sigmoid()
        ids_TK = torch.topk(scores_TE + self.e_score_correction_bias, self.top_k, dim=-1)[1]
        return scores_TE.gather(-1, ids_TK), ids_TK


class Block(nn.Module):
    """A router with experts beside it, which are not run."""

    def __init__(self, router: nn.Module) -> None:
        """Hold this router."""
        super().__init__()
        self.router = router
        self.experts = nn.ModuleList(nn.Identity() for _ in range(E))


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the numbers here, as JSON")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    rows = [
        measured(router, tokens, rate, mode)
        for router in (SoftmaxRouter, OwningRouter)
        for mode, rate in (("eager", 0.001), ("eager", "auto"), ("compiled", 0.001))
        for tokens in ROUNDS
    ]
    sys.stdout.write(table(rows))
    if out is not None:
        out.write_text(json.dumps(rows, indent=2))


def measured(router: Callable[[], nn.Module], tokens: int, rate: float | str, mode: str) -> dict:
    """Cost of the attached router at this many tokens."""
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
    host, cost = paired(lambda: plain(x_TD), lambda: attached(x_TD), ROUNDS[tokens])
    if site.measures_spread:
        site.spread_is_due = False
        between = paired(lambda: plain(x_TD), lambda: attached(x_TD), ROUNDS[tokens])[1]
        cost = between + (cost - between) / SPREAD_EVERY
    one_op = paired(lambda: None, lambda: SMALL + 1, 2000)[1]
    return {
        "router": type(block.router).__name__,
        "mode": mode,
        "rate": rate,
        "tokens": tokens,
        "router_us": round(host, 1),
        "cost_us": round(cost, 1),
        "share": round(cost / host, 4),
        "ops": round(cost / one_op, 1),
    }


def counted(site: Site, tokens: int) -> bool:
    """Whether the site saw the call."""
    return int(site.counts.sum()) == tokens * K


def paired(plain: Callable[[], object], attached: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Microseconds of the plain call, and of what the attached one takes more; medians."""
    calls = {"plain": plain, "attached": attached}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + rounds // 10):
        for name in random.sample(list(calls), 2):
            start = time.process_time_ns()
            calls[name]()
            times[name].append((time.process_time_ns() - start) / 1000)
    warm = {name: values[rounds // 10 :] for name, values in times.items()}
    differences = [after - before for before, after in zip(warm["plain"], warm["attached"], strict=True)]
    return statistics.median(warm["plain"]), statistics.median(differences)


def table(rows: list[dict]) -> str:
    """The rows as text."""
    lines = [
        f"{'router':<15}{'mode':>9}{'rate':>7}{'tokens':>8}{'router us':>11}{'cost us':>9}{'share':>8}{'ops':>7}"
    ]
    lines += [
        f"{r['router']:<15}{r['mode']:>9}{r['rate']:>7}{r['tokens']:>8}{r['router_us']:>11.1f}{r['cost_us']:>9.1f}{r['share']:>8.1%}"
        f"{r['ops']:>7.0f}"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
