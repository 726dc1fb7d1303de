"""Loss-free balancing against an auxiliary loss and against nothing: ``make compare``.

Every run is the demo with other balancing and another seed, in a process of its own. Finished runs are kept, so an
interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from rich.console import Console
from rich.table import Table

from moe_plugin.report.summary import SUMMARY_FILE, RunSummary, read_summary

MEASURES = {
    "perplexity": ("perplexity", 3),
    "max_violation_global": ("MaxVio global", 3),
    "max_violation_batch": ("MaxVio batch", 3),
    "dead_experts": ("dead experts", 1),
}
"""What is compared, how the table calls it, and its digits there."""


@dataclass(frozen=True)
class Arm:
    """One way to balance.

    Attributes:
        name: How the table calls it; also its folder.
        overrides: What it changes in the demo's configuration.
    """

    name: str
    overrides: tuple[str, ...]


ARMS = (
    Arm("none", ("balancing=none",)),
    Arm("aux_loss_0.01", ("balancing=aux_loss", "balancing.auxiliary_loss.coefficient=0.01")),
    Arm("aux_loss_0.001", ("balancing=aux_loss", "balancing.auxiliary_loss.coefficient=0.001")),
    Arm("loss_free", ()),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison and prints its table.

    Args:
        arguments: Words after the program's name; by default the program's own.
    """
    parser = argparse.ArgumentParser(prog="python -m moe_plugin.compare", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs/compare"), help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", help="changes to every run, such as trainer.max_steps=100")
    options = parser.parse_args(arguments)
    for seed in range(options.seeds):
        for arm in ARMS:
            run(arm, seed, options.folder, options.overrides)
    results = {arm.name: collect(arm, options.seeds, options.folder) for arm in ARMS}
    write_csv(results, options.folder / "comparison.csv")
    Console().print(table(results))


def run(arm: Arm, seed: int, folder: Path, overrides: Sequence[str]) -> None:
    """Trains one arm with one seed, unless that run is there already."""
    target = folder_of(arm, seed, folder)
    if (target / SUMMARY_FILE).exists():
        return
    words = ["experiment=demo", *arm.overrides, f"seed={seed}", f"hydra.run.dir={target}", *overrides]
    print(f"{arm.name}, seed {seed}", flush=True)
    subprocess.run([sys.executable, "-m", "moe_plugin.train", *words], check=True, stdout=subprocess.DEVNULL)


def folder_of(arm: Arm, seed: int, folder: Path) -> Path:
    """Where a run lies."""
    return folder / arm.name / f"seed_{seed}"


def collect(arm: Arm, seeds: int, folder: Path) -> list[RunSummary]:
    """The summaries of an arm, by seed."""
    return [read_summary(folder_of(arm, seed, folder) / SUMMARY_FILE) for seed in range(seeds)]


def write_csv(results: dict[str, list[RunSummary]], path: Path) -> None:
    """Writes one row per run."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "seed", *MEASURES, "tokens_per_second", "seconds"])
        for name, summaries in results.items():
            for summary in summaries:
                row = [getattr(summary, key) for key in (*MEASURES, "tokens_per_second", "seconds")]
                writer.writerow([name, summary.seed, *row])


def table(results: dict[str, list[RunSummary]]) -> Table:
    """Mean and standard deviation over the seeds, one row per arm."""
    seeds = max(map(len, results.values()))
    shown = Table(title=f"Held-out text, mean ± standard deviation over {seeds} seeds")
    shown.add_column("balancing")
    for heading, _ in MEASURES.values():
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, summaries in results.items():
        cells = [spread([getattr(run, key) for run in summaries], d) for key, (_, d) in MEASURES.items()]
        shown.add_row(name, *cells)
    return shown


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation as text."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


if __name__ == "__main__":
    main()
