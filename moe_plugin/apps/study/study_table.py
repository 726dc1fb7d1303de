"""The results of a study as Markdown: ``python -m moe_plugin.apps.study.study_table docs/study.csv``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from moe_plugin.apps.study.arms import read_study
from moe_plugin.apps.study.markdown import head, row, spread
from moe_plugin.apps.study.results import Result, by_arm, read_csv

_HEADER = (
    *("arm", "seeds", "perplexity", "perplexity, % over the reference", "lower in", "MaxVio global"),
    *("MaxVio batch", "dead", "experts per token", "MFLOPs per token"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of each study in a CSV of ``moe-study``."""
    parser = argparse.ArgumentParser(prog="python -m moe_plugin.apps.study.study_table", description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--reference", help="arm to compare with; by default the study's own")
    options = parser.parse_args(arguments)
    for study, results in read_csv(options.csv).items():
        sys.stdout.write(
            f"{study}\n\n{markdown(results, options.reference or read_study(study).reference)}\n\n"
        )


def markdown(results: Sequence[Result], reference: str) -> str:
    """Return a row for each arm: mean ± standard deviation over seeds, and the paired difference of perplexity.

    Args:
        results: The runs of one study.
        reference: The arm that each run is compared with, by seed; if it has no runs, the comparison is left out.
    """
    arms = by_arm(results)
    rows = [row(*_cells(arm, runs, arms.get(reference, {}))) for arm, runs in arms.items()]
    return "\n".join([head(*_HEADER), *rows])


def differences(runs: Mapping[int, Result], others: Mapping[int, Result]) -> list[float]:
    """Return perplexity over the other arm's, in percent, one for each seed that both have; see `by_arm`."""
    return [100 * (runs[seed].perplexity / others[seed].perplexity - 1) for seed in runs if seed in others]


def _cells(arm: str, runs: Mapping[int, Result], reference: Mapping[int, Result]) -> Iterator[str]:
    values, paired = list(runs.values()), differences(runs, reference)
    yield from (arm, str(len(runs)), spread([run.perplexity for run in values]))
    is_compared = bool(paired) and runs != reference
    yield spread(paired, 2, "+") if is_compared else ""
    yield f"{sum(value < 0 for value in paired)} of {len(paired)}" if is_compared else ""
    yield spread([run.max_violation_global for run in values])
    yield spread([run.max_violation_batch for run in values])
    yield spread([run.dead_experts for run in values], 1)
    yield spread([run.mean_experts_per_token for run in values])
    yield spread([run.active_flops_per_token / 1e6 for run in values])


if __name__ == "__main__":
    main()
