"""MaxVio and perplexity of every run of a study's CSV, as a picture: ``python -m moe_plugin.apps.study.picture``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from moe_plugin.apps.launch.command import one_line_errors
from moe_plugin.apps.study.results import Result, by_arm, read_csv
from moe_plugin.extras import require
from moe_plugin.plots.picture import FAINT, INK, RULE, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOR = "#1b6ca8"
_ROW, _MARGIN = 0.24, 0.8
"""Inches of an arm, and around the arms of a study."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the studies of a CSV one below the other."""
    parser = argparse.ArgumentParser(prog="python -m moe_plugin.apps.study.picture", description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument(
        "--studies", nargs="+", default=["balancing", "softmax", "dynamic"], help="default: %(default)s"
    )
    parser.add_argument("--out", type=Path, default=Path("study.png"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    with one_line_errors():
        require("matplotlib", "moe_plugin.apps.study.picture")
    results = read_csv(options.csv)
    print(draw({name: results[name] for name in options.studies}, options.out))


def draw(studies: dict[str, list[Result]], out: Path) -> Path:
    """Draw studies, as `read_csv` returns them, into a file.

    A study has a row of two panels, an arm a line: small dots are runs, large ones the mean over seeds.

    Returns:
        The file.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    heights = [_MARGIN + _ROW * len(by_arm(results)) for results in studies.values()]
    with matplotlib.style.context(STYLE):
        figure = Figure((9.5, sum(heights)), layout="constrained", facecolor="white")
        panels = figure.subplots(len(studies), 2, squeeze=False, sharey="row", height_ratios=heights)
        for row, (name, results) in zip(panels, studies.items(), strict=True):
            _draw(row, name, results)
        figure.savefig(out, dpi=150)
    return out


def _draw(panels: Sequence[Axes], name: str, results: Sequence[Result]) -> None:
    """Draw the arms in the order of their balance, the best on top."""
    arms = by_arm(results)
    order = sorted(arms, key=lambda arm: -fmean(run.max_violation_global for run in arms[arm].values()))
    for place, arm in enumerate(order):
        runs = arms[arm].values()
        _draw_line(panels[0], place, [run.max_violation_global for run in runs])
        _draw_line(panels[1], place, [_relative(run, results) for run in runs])
    panels[0].set_yticks(
        range(len(order)), [f"{arm} ({len(arms[arm])})" for arm in order], fontsize=8, color=INK
    )
    panels[0].set_ylim(-0.7, len(order) - 0.3)
    panels[0].set_xscale("log")
    panels[0].set_title(name, loc="left", fontweight="bold", color=INK)
    panels[0].set_xlabel("MaxVio global, held-out text")
    panels[1].axvline(0, color=FAINT, linewidth=1, linestyle=(0, (4, 2)))
    panels[1].set_xlabel("perplexity, % over the mean of the seed")
    for ax in panels:
        ax.grid(color=RULE, linewidth=0.6)
        ax.set_axisbelow(True)


def _draw_line(ax: Axes, place: int, values: Sequence[float]) -> None:
    ax.scatter(values, [place] * len(values), s=12, color=_COLOR, alpha=0.5, linewidths=0)
    ax.scatter(fmean(values), place, s=60, color=_COLOR)


def _relative(run: Result, results: Sequence[Result]) -> float:
    """Return perplexity in percent over the mean of all arms with the most seeds, so seeds can be compared."""
    arms = by_arm(results).values()
    most = max(map(len, arms))
    return 100 * (run.perplexity / fmean(arm[run.seed].perplexity for arm in arms if len(arm) == most) - 1)


if __name__ == "__main__":
    main()
