"""The results of a run for the terminal: balance before and after, and the headline numbers."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Group
from rich.table import Table
from rich.text import Text

from moe_plugin.apps.received.printable import printable
from moe_plugin.apps.report.cells import number_cell
from moe_plugin.apps.report.summary import RunSummary
from moe_plugin.callbacks.load_monitor import LoadMonitor
from moe_plugin.metrics import LayerLoad, layer_loads
from moe_plugin.metrics.router_names import short_names


def run_report(summary: RunSummary, monitor: LoadMonitor) -> Group:
    """Return the tables of the end of a run; print them with a `rich.console.Console`.

    Args:
        summary: The run's headline numbers.
        monitor: The run's monitor, after training.
    """
    tables = []
    after = monitor.validation_load or monitor.training_load
    if monitor.first_record is not None and after:
        before = layer_loads(monitor.first_record.counts)
        window = "validation" if monitor.validation_load else "last training steps"
        tables.append(balance_table(before, after, monitor.training.bias_ranges, window))
    return Group(*tables, headline_table(summary))


def balance_table(
    before: Mapping[str, LayerLoad],
    after: Mapping[str, LayerLoad],
    bias_ranges: Mapping[str, float],
    window: str,
) -> Table:
    """Return the load of each layer at the first step and at the end.

    Args:
        before: The load of each layer in the first step.
        after: The load of each layer at the end.
        bias_ranges: The range of each layer's bias, if it has one.
        window: Where `after` was measured, for the heading.
    """
    table = Table(title=f"Expert load: first step → {window}", title_justify="left", title_style="bold")
    table.add_column("layer", overflow="fold")
    for heading in ("MaxVio", "entropy", "dead experts", "bias range"):
        table.add_column(heading, justify="right")
    short = short_names(after)
    for name, last in after.items():
        table.add_row(
            Text(printable(short[name])),
            *_changes([before[name]], [last]),
            number_cell(bias_ranges.get(name), ".4f"),
        )
    table.add_section()
    table.add_row(
        "all",
        *_changes(before.values(), after.values()),
        number_cell(max(bias_ranges.values(), default=None), ".4f"),
        style="bold",
    )
    return table


def headline_table(summary: RunSummary) -> Table:
    """Return the measures of a run, one per line."""
    table = Table(title="Summary", title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    rows = {
        "validation loss": number_cell(summary.val_loss, ".4f"),
        "perplexity": number_cell(summary.perplexity, ".3f"),
        "MaxVio, whole validation set": number_cell(summary.max_violation_global, ".3f"),
        "MaxVio, per batch": number_cell(summary.max_violation_batch, ".3f"),
        "dead experts": number_cell(summary.dead_experts, "d"),
        "tokens per second": number_cell(summary.tokens_per_second, ",.0f"),
        "seconds": number_cell(summary.seconds, ",.1f"),
        "parameters, total": number_cell(summary.parameters_total, ",d"),
        "parameters, active per token": number_cell(summary.parameters_active, ",d"),
        "experts per token": f"{number_cell(summary.mean_experts_per_token, '.3f')}, "
        f"target {number_cell(summary.target_experts_per_token, 'g')}",
        "FLOPs per token, forward": number_cell(summary.active_flops_per_token, ",.0f"),
        "seed": number_cell(summary.seed, "d"),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def tensorboard_command(logs: Path) -> str:
    """Return the command that shows these logs, quoted for a shell."""
    folder = logs.resolve()
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    return shlex.join(["tensorboard", "--logdir", str(folder)])


def _changes(before: Collection[LayerLoad], after: Collection[LayerLoad]) -> tuple[Text, Text, Text]:
    """Return the cells of layers together: means, and all dead experts."""
    both = (before, after)
    return (
        _change(
            [fmean(load.max_violation_global for load in loads) for loads in both],
            ".2f",
            lower_is_better=True,
        ),
        _change([fmean(load.entropy for load in loads) for loads in both], ".3f", lower_is_better=False),
        _change([sum(load.dead_experts for load in loads) for loads in both], "d", lower_is_better=True),
    )


def _change(both: Sequence[float], style: str, *, lower_is_better: bool) -> Text:
    before, after = both
    better = after <= before if lower_is_better else after >= before
    return Text.assemble((f"{before:{style}} → ", "dim"), (f"{after:{style}}", "green" if better else "red"))
