"""What the fullest expert-parallel rank takes over the mean rank, next to the formula 1 + f * MaxVio_rank.

Each rank's experts, a slice of neighbouring ones, compute forward and backward on as many rows as they get of a global
batch; the ranks take turns in this process. A step waits in every layer for that layer's fullest rank, so times are
added up over layers. Only experts are timed: f is 1. Loads are those of finished runs on held-out text, folders such as
`moe-study` leaves them (runs=STUDY/none/seed_0,STUDY/proportional/seed_0). Without any, one rank gets more than the
others, and then comes the whole layer with its all-to-all: see `benchmarks.two_ranks`. Shape legend: N batches, L
layers, E experts, R ranks, Q rows of a rank, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.row import Row
from benchmarks.turns import Turns, take_turns
from benchmarks.two_ranks import EXPERTS, TOP_K, D, layer_rows, step
from moe_plugin.apps.study.trained_run import counts_of, in_batches, load_run, look
from moe_plugin.experts import GroupedExperts
from moe_plugin.metrics.rank_groups import rank_violation

RANKS = (2, 4, 8, 16)
VIOLATIONS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
WARM_UP = 1


def rows(rounds: int = 7, tokens: int = 8192, hidden: int = 512, runs: str = "") -> Iterator[Row]:
    """Yield every run or every violation, over 2 to 16 ranks; `tokens` are of the global batch."""
    for folder in map(Path, filter(None, runs.split(","))):
        batches = batches_of(folder, tokens)
        for ranks in RANKS:
            yield compare(f"{folder.parent.name}/{folder.name}", batches, ranks, rounds, hidden)
    if not runs:
        for ranks in RANKS:
            for violation in VIOLATIONS:
                if violation < ranks:
                    batches = [one_full_rank(violation, ranks, tokens * TOP_K)]
                    yield compare("one full rank", batches, ranks, rounds, hidden)
        yield from layer_rows(rounds, tokens // 2, hidden)


def batches_of(run: Path, tokens: int) -> list[Tensor]:
    """Return the tokens per expert in each held-out batch of a run; int64 (L, E)."""
    trained = load_run(run)
    ids, _ = look(trained, trained.data.val_dataloader())
    by_layer = [
        [counts_of(part, site) for part in in_batches(ids[name], tokens)]
        for name, site in trained.balanced.items()
    ]
    return [torch.stack(layers) for layers in zip(*by_layer, strict=True)]


def one_full_rank(violation: float, ranks: int, pairs: int) -> Tensor:
    """Return counts (1, E): the first rank has this violation, and a rank's experts are equally full."""
    full = round(pairs * (1 + violation) / ranks)
    rest = (pairs - full) // (ranks - 1)
    loads_R = torch.tensor([full, *[rest] * (ranks - 1)])
    return (loads_R // (EXPERTS // ranks)).repeat_interleave(EXPERTS // ranks)[None]


def compare(name: str, batches: list[Tensor], ranks: int, rounds: int, hidden: int) -> Row:
    """Return the fullest rank over the mean one."""
    used: list[Tensor] = []
    source = cycle(batches)

    def next_batch() -> Tensor:
        used.append(next(source))
        return used[-1]

    num_layers, num_experts = batches[0].shape
    steps = [expert_step(num_experts // ranks, rank, hidden) for rank in range(ranks)]
    sides = {
        f"{layer} {rank}": partial(step_of_layer, steps[rank], layer)
        for layer in range(num_layers)
        for rank in range(ranks)
    }
    turns = take_turns(sides, rounds, fresh=next_batch, warm_up=WARM_UP)
    counts_NLE = torch.stack(used[-rounds:])
    violation = rank_violation(counts_NLE, [num_experts] * num_layers, ranks).mean().item()
    title = f"{name}, {ranks} ranks, MaxVio_rank {violation:.2f}"
    note = f"formula {1 + violation:.2f}"
    return slowest_and_mean(turns, counts_NLE, ranks).row(title, "slowest", "mean rank", note=note)


def slowest_and_mean(turns: Turns, counts_NLE: Tensor, ranks: int) -> Turns:
    """Return each round's seconds of each layer's fullest rank, and of the mean rank, added up over layers."""
    num_layers = counts_NLE.shape[1]
    shape = (num_layers, ranks, len(counts_NLE))
    seconds_LRN = torch.tensor(list(turns.seconds.values()), dtype=torch.float64).view(shape)
    # The fullest, not the one that took longest: of equally full ranks one always takes longest by chance.
    fullest_1NL = counts_NLE.unflatten(-1, (ranks, -1)).sum(-1).argmax(-1)[None]
    slowest_N = seconds_LRN.gather(1, fullest_1NL.permute(2, 0, 1)).sum((0, 1))
    return Turns({"slowest": slowest_N.tolist(), "mean rank": seconds_LRN.mean(1).sum(0).tolist()})


def step_of_layer(step: Callable[[Tensor], None], layer: int, counts_LE: Tensor) -> None:
    """Give a rank its rows of a layer."""
    step(counts_LE[layer])


def expert_step(num_own: int, rank: int, hidden: int) -> Callable[[Tensor], None]:
    """Return both passes of a rank's experts, on as many rows as they get of a layer's counts."""
    experts = GroupedExperts(num_own, D, hidden)

    def run(counts_E: Tensor) -> None:
        step(experts, torch.arange(num_own).repeat_interleave(counts_E.view(-1, num_own)[rank])[:, None])

    return run
