"""Do harder tokens get more experts: ``python -m moe_plugin.apps.study.difficulty DYNAMIC_ARM FIXED_ARM``.

For each seed that both arms have, the number of experts that each held-out token uses in the first run, by layer, is
compared with the loss of the same token in the second run, whose tokens all use equally many. The measure is Spearman's
rank correlation over all tokens, and within each position of the sequence (the mean over positions): the second does
not depend on how hard early and late tokens are.

Shape legend: T tokens, S positions in a sequence, K experts selected per token at most.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from moe_plugin.apps.launch.command import one_line_errors
from moe_plugin.apps.study.markdown import head, row, spread
from moe_plugin.apps.study.trained_run import load_run, look, runs_of
from moe_plugin.metrics.experts_used import rank_correlation


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a Markdown table, mean and standard deviation over the seeds."""
    parser = argparse.ArgumentParser(prog="python -m moe_plugin.apps.study.difficulty", description=__doc__)
    parser.add_argument("dynamic", type=Path, help="folder of an arm, such as runs/study/dynamic/top_p")
    parser.add_argument("fixed", type=Path, help="the same, with a fixed number of experts")
    parser.add_argument("--tokens", type=int, default=131072, help="of held-out text (default: %(default)s)")
    options = parser.parse_args(arguments)
    with one_line_errors():
        dynamic, fixed = runs_of(options.dynamic), runs_of(options.fixed)
    seeds = sorted(dynamic.keys() & fixed.keys())
    by_seed = [_correlations(dynamic[seed], fixed[seed], options.tokens) for seed in seeds]
    print(head(f"{options.dynamic.name}, {len(seeds)} seeds", "mean k", "all tokens", "within positions"))
    for layer in by_seed[0]:
        columns = zip(*(measured[layer] for measured in by_seed), strict=True)
        print(row(layer, *map(spread, columns)))


def _correlations(dynamic: Path, fixed: Path, tokens: int) -> dict[str, tuple[float, float, float]]:
    """Return by router mean k, and the rank correlation of k with the loss over all tokens and within positions."""
    run = load_run(dynamic)
    batches = run.held_out(tokens)
    losses_T = look(load_run(fixed), batches)[1]
    ids = look(run, batches)[0]
    result = {}
    for name, site in run.balanced.items():
        used_T = ((ids[name] >= 0) & (ids[name] < site.num_routed)).sum(-1)
        within = within_positions(used_T, losses_T, run.data.context_length)
        result[name] = (used_T.double().mean().item(), spearman(used_T, losses_T), within)
    return result


def within_positions(a_T: Tensor, b_T: Tensor, length: int) -> float:
    """Return Spearman's rank correlation at each position, mean over the positions where both vary.

    Args:
        a_T: A number for each token, sequence after sequence.
        b_T: Another number for each token.
        length: Tokens of a sequence.
    """
    a_S, b_S = a_T.view(-1, length).unbind(1), b_T.view(-1, length).unbind(1)
    return torch.tensor([spearman(a, b) for a, b in zip(a_S, b_S, strict=True)]).nanmean().item()


def spearman(a_T: Tensor, b_T: Tensor) -> float:
    """Return Spearman's rank correlation, ties with their mean rank, NaN if one is constant; see `within_positions`."""
    a_values, a_places_T = a_T.unique(return_inverse=True)
    b_values, b_places_T = b_T.unique(return_inverse=True)
    cells_T = a_places_T * len(b_values) + b_places_T
    table = cells_T.bincount(minlength=len(a_values) * len(b_values)).view(len(a_values), -1)
    return rank_correlation(table).item()


if __name__ == "__main__":
    main()
