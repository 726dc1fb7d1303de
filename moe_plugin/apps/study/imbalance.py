"""Where the imbalance that is left comes from: ``python -m moe_plugin.apps.study.imbalance ARM_FOLDER...``.

Each run's last checkpoint is taken, and MaxVio (mean over layers) is measured with its weights as they are and

- the run's bias on held-out text, and on training text that would have come next;
- the bias to which the rule settles on training text with the router still: the difference is the lag;
- the bias solved for on that training text (`calibrate`): the difference is the noise of a rule that sees one batch.

The difference between held-out and training text at the same bias is the shift. Last, MaxVio of single batches at the
solved bias, of neighbouring tokens and of tokens drawn from all batches: the difference is that tokens of a batch are
alike.

Shape legend: T tokens, K experts selected per token at most.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from moe_plugin.apps.launch.command import one_line_errors
from moe_plugin.apps.study.markdown import spread
from moe_plugin.apps.study.trained_run import Batch, Trained, counts_of, in_batches, load_run, look, runs_of
from moe_plugin.attach.site import Site
from moe_plugin.metrics import max_violation

Measure = Callable[[Tensor, Site], float]
COLUMNS = (
    *("held-out", "training", "training, settled", "training, solved", "held-out, solved"),
    *("batch, solved", "batch, solved, mixed"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a Markdown table, mean and standard deviation over the seeds of each arm.

    Args:
        arguments: Words after the program's name; by default the program's own.
    """
    parser = argparse.ArgumentParser(prog="python -m moe_plugin.apps.study.imbalance", description=__doc__)
    parser.add_argument(
        "arms", nargs="+", type=Path, help="folders of arms, such as runs/study/balancing/none"
    )
    parser.add_argument(
        "--batches", type=int, default=64, help="batches of each window (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, help="only the first so many")
    options = parser.parse_args(arguments)
    with one_line_errors():
        runs = {arm.name: list(runs_of(arm).values())[: options.seeds] for arm in options.arms}
    print("| arm | seeds | " + " | ".join(COLUMNS) + " |\n|---|" + "---|" * (len(COLUMNS) + 1), flush=True)
    for arm, folders in runs.items():
        measured = [measure(load_run(folder), options.batches) for folder in folders]
        cells = [
            spread([each[column] for each in measured]) if column in measured[0] else "" for column in COLUMNS
        ]
        print(f"| {arm} | {len(folders)} | " + " | ".join(cells) + " |", flush=True)


def measure(run: Trained, num_batches: int) -> dict[str, float]:
    """Return MaxVio of each of `COLUMNS`; none for a rule that settles where the run had no rule."""
    window, other = run.next_batches(0, num_batches), run.next_batches(num_batches, num_batches)
    held_out = run.held_out(num_batches * run.data.batch_size * run.data.context_length)
    measured = {"held-out": whole(run, held_out), "training": whole(run, other)}
    if run.balanced.step:
        settle_(run, window)
        measured["training, settled"] = whole(run, other)
    run.balanced.calibrate(_runner(window), passes=1)
    ids = look(run, other)[0]
    tokens = run.data.batch_size * run.data.context_length
    return measured | {
        "training, solved": over_layers(run, ids, violation),
        "held-out, solved": whole(run, held_out),
        "batch, solved": over_layers(run, ids, by_batch(tokens)),
        "batch, solved, mixed": over_layers(run, mixed(ids), by_batch(tokens)),
    }


def settle_(run: Trained, batches: Sequence[Batch]) -> None:
    """Let the rule follow the load of one batch after another, without training: counting needs gradients on."""
    for batch in batches:
        run.model(batch["tokens"][:, :-1])
        run.balanced.update()


def whole(run: Trained, batches: Sequence[Batch]) -> float:
    """Return MaxVio over all batches together, mean over layers."""
    return over_layers(run, look(run, batches)[0], violation)


def over_layers(run: Trained, ids: Mapping[str, Tensor], measure: Measure) -> float:
    """Return the mean of a measure over layers."""
    return fmean(measure(ids[name], site) for name, site in run.balanced.items())


def violation(ids_TK: Tensor, site: Site) -> float:
    """Return MaxVio of these tokens."""
    return max_violation(counts_of(ids_TK, site)).item()


def by_batch(tokens: int) -> Measure:
    """Return MaxVio of batches of so many tokens, mean over them."""
    return lambda ids_TK, site: fmean(violation(part, site) for part in in_batches(ids_TK, tokens))


def mixed(ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tokens in another order, so that neighbours have nothing to do with each other."""
    tokens = len(next(iter(ids.values())))
    order_T = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
    return {name: ids_TK[order_T] for name, ids_TK in ids.items()}


def _runner(batches: Sequence[Batch]) -> Callable[[nn.Module], None]:
    def run(model: nn.Module) -> None:
        for batch in batches:
            model(batch["tokens"][:, :-1])

    return run


if __name__ == "__main__":
    main()
