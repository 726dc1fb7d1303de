"""The trials as a table."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from moe_plugin.apps.simulate.trial import BALANCED, Setting, Trial

_COLUMNS = (
    f"steps to {BALANCED}",
    "MaxVio expected",
    "MaxVio batch",
    "batch / floor",
    "step / spread",
    "range / spread",
)
Trials = Mapping[str, Mapping[str, Trial]]
"""By source, then by rule."""


def trial_table(trials: Trials, setting: Setting) -> Table:
    """Return one row per rule, one section per source; the smallest MaxVio of a section is bold.

    Args:
        trials: By source, then by rule.
        setting: The sizes of all of them.
    """
    table = Table(title=f"{setting}; sampling floor of MaxVio {setting.floor:.3f}")
    table.add_column("scores", no_wrap=True)
    table.add_column("rule", no_wrap=True)
    for heading in _COLUMNS:
        table.add_column(heading, justify="right")
    for source, by_rule in trials.items():
        best = min(by_rule, key=lambda rule: by_rule[rule].tail_expected)
        for place, (rule, trial) in enumerate(by_rule.items()):
            table.add_row("" if place else source, rule, *_cells(trial, setting, rule == best))
        table.add_section()
    return table


def _cells(trial: Trial, setting: Setting, is_best: bool) -> list[str]:
    expected = f"{trial.tail_expected:.3f}"
    return [
        "never" if trial.steps_to_balance is None else str(trial.steps_to_balance),
        f"[bold]{expected}[/bold]" if is_best else expected,
        f"{trial.tail_batch:.3f}",
        f"{trial.tail_batch / setting.floor:.1f}",
        f"{trial.oscillation:.4f}",
        f"{trial.bias_range:.2f}",
    ]
