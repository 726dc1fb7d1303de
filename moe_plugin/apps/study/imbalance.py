"""Where the imbalance that is left comes from: ``python -m moe_plugin.apps.study.imbalance ARM_FOLDER...``.

Each run's last checkpoint is taken, and MaxVio (mean over layers) is measured with its weights as they are and

- the run's bias on held-out text, and on the training text that would have come next;
- the bias to which the rule settles on training text with a frozen router: the difference is the lag;
- the bias that `calibrate` finds on that training text: the difference is the noise of a rule that sees one batch.

The difference between held-out and training text at the same bias is the shift. Last comes MaxVio of single batches at
the solved bias, of neighbouring tokens and of tokens drawn from all batches: tokens of a batch are alike, and the
difference shows how much that adds.

Shape legend: T tokens, K experts selected per token at most.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from moe_plugin.apps.launch.command import one_line_errors
from moe_plugin.apps.study.markdown import head, row, spread
from moe_plugin.apps.study.trained_run import Batch, Trained, counts_of, in_batches, load_run, look, runs_of
from moe_plugin.attach.site import Site
from moe_plugin.metrics import max_violation

_Measure = Callable[[Tensor, Site], float]
_COLUMNS = (
    *("held-out", "training", "training, settled", "training, solved", "held-out, solved"),
    *("batch, solved", "batch, solved, mixed"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a Markdown table, mean and standard deviation over the seeds of each arm."""
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
    print(head("arm", "seeds", *_COLUMNS), flush=True)
    for arm, folders in runs.items():
        measured = [_measure(load_run(folder), options.batches) for folder in folders]
        cells = [
            spread([each[column] for each in measured]) if column in measured[0] else ""
            for column in _COLUMNS
        ]
        print(row(arm, str(len(folders)), *cells), flush=True)


def _measure(run: Trained, num_batches: int) -> dict[str, float]:
    """Return MaxVio of each of `_COLUMNS`; without that of a settled rule if the run had no rule."""
    tokens = run.data.batch_size * run.data.context_length
    window, other = run.next_batches(0, num_batches), run.next_batches(num_batches, num_batches)
    held_out = run.held_out(num_batches * tokens)
    measured = {"held-out": _whole(run, held_out), "training": _whole(run, other)}
    if run.balanced.step:
        _settle_(run, window)
        measured["training, settled"] = _whole(run, other)
    run.balanced.calibrate(partial(_forward, batches=window), passes=1)
    ids = look(run, other)[0]
    return measured | {
        "training, solved": over_layers(run, ids, violation),
        "held-out, solved": _whole(run, held_out),
        "batch, solved": over_layers(run, ids, _by_batch(tokens)),
        "batch, solved, mixed": over_layers(run, _mixed(ids), _by_batch(tokens)),
    }


def _settle_(run: Trained, batches: Sequence[Batch]) -> None:
    """Let the rule follow the load of each batch without training; counting needs gradients on."""
    for batch in batches:
        _forward(run.model, [batch])
        run.balanced.update()


def _whole(run: Trained, batches: Sequence[Batch]) -> float:
    """Return MaxVio over all batches together, mean over layers."""
    return over_layers(run, look(run, batches)[0], violation)


def over_layers(run: Trained, ids: Mapping[str, Tensor], measure: _Measure) -> float:
    """Return the mean of a measure over layers.

    Args:
        run: The run.
        ids: Selected experts of each token, by router.
        measure: Takes the selections and the site of a router.
    """
    return fmean(measure(ids[name], site) for name, site in run.balanced.items())


def violation(ids_TK: Tensor, site: Site) -> float:
    """Return MaxVio of tokens in a layer; see `over_layers` for the arguments."""
    return max_violation(counts_of(ids_TK, site)).item()


def _by_batch(tokens: int) -> _Measure:
    """Return MaxVio of batches of so many tokens, mean over them."""
    return lambda ids_TK, site: fmean(violation(part, site) for part in in_batches(ids_TK, tokens))


def _mixed(ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tokens in random order."""
    tokens = len(next(iter(ids.values())))
    order_T = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
    return {name: ids_TK[order_T] for name, ids_TK in ids.items()}


def _forward(model: nn.Module, batches: Sequence[Batch]) -> None:
    for batch in batches:
        model(batch["tokens"][:, :-1])


if __name__ == "__main__":
    main()
