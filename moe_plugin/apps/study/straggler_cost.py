"""The cost of imbalance with expert parallelism: ``python -m moe_plugin.apps.study.straggler_cost ARM_FOLDER...``.

All ranks wait for the one with the most tokens: a step takes `1 + f * MaxVio_rank` times as long as a balanced one. f
is the share of the experts in a balanced step, MaxVio_rank the violation of the load per rank; a rank holds
neighbouring experts. Measured from the selections of each run's last checkpoint on held-out batches.

Shape legend: N batches, L MoE layers, E experts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from moe_plugin.apps.launch.command import one_line_errors
from moe_plugin.apps.study.markdown import head, row, spread
from moe_plugin.apps.study.trained_run import Trained, counts_of, in_batches, load_run, look, runs_of
from moe_plugin.metrics.rank_groups import RANKS, rank_violation


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a Markdown table: MaxVio per rank and the step time, over the seeds of each arm."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_plugin.apps.study.straggler_cost", description=__doc__
    )
    parser.add_argument(
        "arms", nargs="+", type=Path, help="folders of arms, such as runs/study/balancing/none"
    )
    parser.add_argument("--expert-share", type=float, default=0.5, help="f (default: %(default)s)")
    parser.add_argument(
        "--batch-tokens", type=int, default=8192, help="tokens of a batch (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=131072, help="of held-out text (default: %(default)s)")
    options = parser.parse_args(arguments)
    with one_line_errors():
        runs = {arm.name: list(runs_of(arm).values()) for arm in options.arms}
    columns = [title for ranks in RANKS for title in (f"MaxVio, {ranks} ranks", "step time")]
    print(head("arm", "seeds", *columns))
    for arm, folders in runs.items():
        measured = [_by_ranks(load_run(folder), options.tokens, options.batch_tokens) for folder in folders]
        print(row(arm, str(len(folders)), *_cells(measured, options.expert_share)), flush=True)


def _cells(measured: Sequence[Sequence[float]], expert_share: float) -> list[str]:
    """Return the cells of an arm; empty if there are fewer experts than ranks."""
    cells = []
    for values in zip(*measured, strict=True):
        known = values[0] == values[0]
        times = [1 + expert_share * value for value in values]
        cells += [spread(values), spread(times, 2)] if known else ["", ""]
    return cells


def _by_ranks(run: Trained, tokens: int, batch_tokens: int) -> list[float]:
    """Return MaxVio per rank for each of `RANKS`, mean over batches and layers; NaN if experts do not divide."""
    ids, sites = look(run, run.held_out(tokens))[0], run.balanced
    by_layer = [
        torch.stack([counts_of(part, site) for part in in_batches(ids[name], batch_tokens)])
        for name, site in sites.items()
    ]
    counts_NLE, experts = torch.stack(by_layer, dim=1), [site.num_routed for site in sites.values()]
    return [rank_violation(counts_NLE, experts, ranks).mean().item() for ranks in RANKS]


if __name__ == "__main__":
    main()
