"""The trials as a picture: a column for each rule, a row for each source of scores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moe_plugin.apps.simulate.trial import BALANCED, Setting, Trial
from moe_plugin.apps.simulate.trial_table import Trials
from moe_plugin.plots.picture import FAINT, INK, LINES, RULE, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_EXPECTED, _BATCH = LINES[1], "#f2a154"
_LOWEST, _HIGHEST = 0.01, 150.0


def trial_picture(trials: Trials, setting: Setting, out: Path) -> Path:
    """Draw MaxVio over steps of every rule on every source, all on the same axes; see `trial_table`.

    Returns:
        The file.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    rules = list(next(iter(trials.values())))
    with matplotlib.style.context(STYLE):
        figure = Figure(
            (2.0 * len(rules) + 1, 1.9 * len(trials) + 0.9), layout="constrained", facecolor="white"
        )
        grid = figure.subplots(len(trials), len(rules), sharex=True, sharey=True, squeeze=False)
        for axes, (source, by_rule) in zip(grid, trials.items(), strict=True):
            for ax, (rule, trial) in zip(axes, by_rule.items(), strict=True):
                _draw(ax, trial, setting)
                if ax in grid[0]:
                    ax.set_title(rule, loc="left", fontweight="bold", fontsize=10)
            axes[0].set_ylabel(f"{source}\nMaxVio", color=INK)
        for ax in grid[-1]:
            ax.set_xlabel("step")
        _explain(figure, grid[0, 0], setting)
        figure.savefig(out, dpi=150)
    return out


def _draw(ax: Axes, trial: Trial, setting: Setting) -> None:
    steps = range(1, setting.steps + 1)
    ax.set_yscale("log")
    ax.set_ylim(_LOWEST, _HIGHEST)
    ax.set_yticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])
    ax.grid(axis="y", color=RULE, linewidth=0.6)
    ax.plot(steps, trial.batch, color=_BATCH, linewidth=0.8, label="of each batch")
    ax.plot(
        steps,
        trial.expected,
        color=_EXPECTED,
        linewidth=1.6,
        label="expected: a batch without its sampling noise",
    )
    ax.axhline(
        setting.floor,
        color=FAINT,
        linewidth=1,
        linestyle=(0, (4, 2)),
        label="floor that sampling sets a batch",
    )
    reached = "never" if trial.steps_to_balance is None else f"at step {trial.steps_to_balance}"
    ax.text(0.97, 0.95, f"< {BALANCED} {reached}\nsettles at {trial.tail_expected:.3f}", transform=ax.transAxes,
            ha="right", va="top", fontsize=8, color=INK)  # fmt: skip


def _explain(figure, ax: Axes, setting: Setting) -> None:
    figure.suptitle(str(setting), x=0.01, ha="left", fontsize=11, fontweight="bold")
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=3, frameon=False)
