"""The picture of one or several runs: the load of each expert, and MaxVio over time.

Shape legend: L MoE layers, E experts (of the layer that has most).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_plugin.errors import ConfigError
from moe_plugin.metrics import dead_experts, max_violation
from moe_plugin.plots.colors import DEAD, OCTAVES, diverging_scale, load_colors, load_octaves
from moe_plugin.plots.run_data import RunData

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT, RULE = "#2b2b33", "#7d7d88", "#dcdce2"
# Okabe and Ito's colours, darkened where they are too light for a line on white.
LINES = ["#c4570c", "#2062a8", "#3f8f6b", "#9b5fa5", "#8a7a10", "#4f4f5a"]
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}
PANELS_PER_ROW = 3
CURVES_INCHES = 2.7
VIOLATION = "load/max_violation_global"


@dataclass(frozen=True)
class Panel:
    """One heatmap: its title, the tokens it covers, and the counts (L, E)."""

    title: str
    window: str
    tokens_LE: np.ndarray


def load_picture(runs: Sequence[RunData], out: Path) -> Path:
    """Draw the load of runs: a heatmap for each, and MaxVio over training steps for all.

    A single run is shown at its first step and at its end; several runs are shown at their ends, on held-out
    data if they were validated.

    Args:
        runs: At least one run.
        out: The file to write; its suffix chooses the format.

    Returns:
        The file.

    Raises:
        ConfigError: No run has logged its load.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    panels = _panels(runs)
    curves = [run for run in runs if VIOLATION in run.scalars]
    if not panels and not curves:
        raise ConfigError("RUN", "must have logged its load with LoadMonitor", [run.label for run in runs])
    with matplotlib.style.context(STYLE):
        figure = Figure(layout="constrained", facecolor="white")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.1)  # pyright: ignore
        columns, rows = max(1, min(len(panels), PANELS_PER_ROW)), -(-len(panels) // PANELS_PER_ROW)
        layers = max((len(panel.tokens_LE) for panel in panels), default=0)
        heights = [min(1.1 + 0.22 * layers, 4.5)] * rows + [CURVES_INCHES]
        figure.set_size_inches(10, sum(heights))
        widths = [*[1.0] * columns, 0.25 * columns]
        grid = figure.add_gridspec(rows + 1, columns + 1, height_ratios=heights, width_ratios=widths)
        for place, panel in enumerate(panels):
            row, column = divmod(place, PANELS_PER_ROW)
            _draw_panel(figure.add_subplot(grid[row, column]), panel, is_first=column == 0)
        if panels:
            _draw_color_bar(figure.add_subplot(grid[0, -1]))
        _draw_curves(figure.add_subplot(grid[-1, :-1]), curves)
        figure.savefig(out, dpi=200)
    return out


def _panels(runs: Sequence[RunData]) -> list[Panel]:
    if len(runs) > 1:
        return [_last_load(run, run.label) for run in runs if any(run.counts.values())]
    training = runs[0].counts.get("load", [])
    if not training:
        return []
    step, tokens_LE = training[0]
    return [
        Panel("At the first step", f"training step {step + 1}", tokens_LE),
        _last_load(runs[0], "At the end"),
    ]


def _last_load(run: RunData, title: str) -> Panel:
    kind, window = ("val", "held-out data") if run.counts.get("val") else ("load", "training data")
    step, tokens_LE = run.counts[kind][-1]
    return Panel(title, f"{window}, step {step + 1}", tokens_LE)


def _draw_panel(ax: Axes, panel: Panel, *, is_first: bool) -> None:
    tokens_LE = torch.from_numpy(panel.tokens_LE).long()
    sizes_L = (tokens_LE >= 0).sum(-1)
    octaves_LE = load_octaves(tokens_LE, sizes_L)
    counts_LE = tokens_LE.clamp(min=0)
    violation = max_violation(counts_LE, sizes_L).mean().item()
    dead = int(dead_experts(counts_LE, sizes_L).sum())
    ax.imshow(load_colors(octaves_LE), aspect="auto", interpolation="nearest")
    _mark_cells(ax, octaves_LE)
    ax.spines[:].set_visible(False)
    ax.set_xlabel(f"expert  ({panel.window})")
    ax.set_ylabel("layer" if is_first else "")
    ax.xaxis.get_major_locator().set_params(integer=True)  # pyright: ignore
    ax.yaxis.get_major_locator().set_params(integer=True)  # pyright: ignore
    ax.set_title(panel.title, loc="left", fontsize=11, fontweight="bold", pad=19)
    numbers = f"MaxVio {violation:.2f}, {dead or 'no'} dead {'expert' if dead == 1 else 'experts'}"
    ax.annotate(numbers, (0, 1), (0, 6), "axes fraction", "offset points", color=FAINT).set_in_layout(False)


def _mark_cells(ax: Axes, octaves_LE: np.ndarray) -> None:
    """Draw lines between cells and crosses on dead experts, if the cells are large enough."""
    layers, experts = octaves_LE.shape
    if layers > 32 or experts > 64:
        return
    for edge in range(1, experts):
        ax.axvline(edge - 0.5, color="white", linewidth=0.8)
    for edge in range(1, layers):
        ax.axhline(edge - 0.5, color="white", linewidth=0.8)
    dead, size = np.argwhere(np.isneginf(octaves_LE)), min(20, 300 / experts)
    ax.scatter(dead[:, 1], dead[:, 0], marker="x", s=size, color="white", linewidths=0.9)


def _draw_color_bar(ax: Axes) -> None:
    """Draw the scale and the mark of a dead expert, in the column right of the heatmaps."""
    ax.set_axis_off()
    ramp = ax.inset_axes((0, 0.22, 0.07, 0.78))
    ramp.imshow(diverging_scale()[:, None], aspect="auto", origin="lower", extent=(0, 1, -OCTAVES, OCTAVES))
    ramp.yaxis.tick_right()
    ramp.set_xticks([])
    ramp.set_yticks(range(-3, 4), ["1/8", "1/4", "1/2", "ideal load", "2×", "4×", "8×"])  # noqa: RUF001
    dead = ax.inset_axes((0, 0, 0.07, 0.12), facecolor=[channel / 255 for channel in DEAD])
    dead.scatter([0], [0], marker="x", s=18, color="white", linewidths=0.9)
    dead.yaxis.tick_right()
    dead.set_xticks([])
    dead.set_yticks([0], ["no token"])
    for part in (ramp, dead):
        part.spines[:].set_visible(False)


def _draw_curves(ax: Axes, runs: Sequence[RunData]) -> None:
    """Draw the mean over layers as a strong line, each layer as a faint one, and the run's name at the end."""
    from matplotlib.ticker import LogLocator

    ax.set_title("MaxVio in training", loc="left", fontsize=11, fontweight="bold", pad=19)
    caption = (
        "how far the most loaded expert is above the mean load; strong: mean over layers, faint: each layer"
    )
    ax.annotate(caption, (0, 1), (0, 6), "axes fraction", "offset points", color=FAINT)
    ax.set_yscale("log")
    ax.grid(axis="y", which="major", color=RULE, linewidth=0.6)
    ax.set_xlabel("optimizer step")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
    ends = []
    for run, color in zip(runs, cycle(LINES), strict=False):
        for tag, (steps, values) in run.scalars.items():
            if tag.startswith("load_layers/max_violation/"):
                ax.plot(steps, values, color=color, linewidth=0.7, alpha=0.28)
        steps, values = run.scalars[VIOLATION]
        ax.plot(steps, values, color=color, linewidth=2)
        ends.append((values[-1], f"{run.label}  {values[-1]:.2f}", color))
    ax.margins(x=0.01)
    _label_ends(ax, ends)


def _label_ends(ax: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Write each run's name next to the end of its line, at least a line of text apart."""
    low, high = np.log10(ax.get_ylim())
    ends = sorted(ends)
    heights = [(np.log10(max(value, 10**low)) - low) / (high - low) for value, _, _ in ends]
    for height, (_, text, color) in zip(_spread(heights, 0.1), ends, strict=True):
        label = ax.annotate(
            text, (1, height), (8, 0), "axes fraction", "offset points", color=color, va="center"
        )
        label.set(fontweight="bold", in_layout=False)


def _spread(heights: list[float], least: float) -> list[float]:
    """Return rising heights, moved until neighbours are `least` apart and the last is at most 1."""
    apart = list(heights)
    for place in range(1, len(apart)):
        apart[place] = max(apart[place], apart[place - 1] + least)
    top = 1.0
    for place in reversed(range(len(apart))):
        apart[place] = min(apart[place], top)
        top = apart[place] - least
    return apart
