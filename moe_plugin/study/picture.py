"""Perplexity over MaxVio of every run: ``python -m moe_plugin.study.picture docs/study.csv --out docs/study.png``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from moe_plugin.plots.picture import FAINT, INK, RULE, STYLE
from moe_plugin.study.results import Result, by_arm, read_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = (
    "#1b6ca8",
    "#d1495b",
    "#2e8b57",
    "#edae49",
    "#7b4fa3",
    "#00798c",
    "#8d6b4f",
    "#e377c2",
    "#555555",
    "#9acd32",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws the studies of a CSV side by side.

    Args:
        arguments: Words after the program's name; by default the program's own.
    """
    parser = argparse.ArgumentParser(prog="python -m moe_plugin.study.picture", description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument(
        "--studies", nargs="+", default=["balancing", "softmax", "dynamic"], help="default: %(default)s"
    )
    parser.add_argument("--out", type=Path, default=Path("study.png"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    results = read_csv(options.csv)
    print(draw({name: results[name] for name in options.studies}, options.out))


def draw(studies: dict[str, list[Result]], out: Path) -> Path:
    """A panel per study: small dots are runs, large ones the mean over seeds.

    Returns:
        The file.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(STYLE):
        figure = Figure((5.4 * len(studies), 4.4), layout="constrained", facecolor="white")
        for ax, (name, results) in zip(
            figure.subplots(1, len(studies), squeeze=False)[0], studies.items(), strict=True
        ):
            _draw(ax, name, results)
        figure.savefig(out, dpi=150)
    return out


def _draw(ax: Axes, name: str, results: Sequence[Result]) -> None:
    for color, (arm, runs) in zip(COLORS, by_arm(results).items(), strict=False):
        violations = [run.max_violation_global for run in runs.values()]
        perplexities = [_relative(run, results) for run in runs.values()]
        ax.scatter(violations, perplexities, s=12, color=color, alpha=0.5, linewidths=0)
        ax.scatter(fmean(violations), fmean(perplexities), s=80, color=color, label=f"{arm} ({len(runs)})")
    ax.set_xscale("log")
    ax.axhline(0, color=FAINT, linewidth=1, linestyle=(0, (4, 2)))
    ax.grid(color=RULE, linewidth=0.6)
    ax.set_title(name, loc="left", fontweight="bold", color=INK)
    ax.set_xlabel("MaxVio global, held-out text")
    ax.set_ylabel("perplexity, % over the mean of the seed")
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _relative(run: Result, results: Sequence[Result]) -> float:
    """In percent over the mean of all arms with as many seeds as any, so that seeds can be compared."""
    arms = by_arm(results).values()
    most = max(map(len, arms))
    return 100 * (run.perplexity / fmean(arm[run.seed].perplexity for arm in arms if len(arm) == most) - 1)


if __name__ == "__main__":
    main()
