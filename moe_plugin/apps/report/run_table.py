"""What a run came to, for the terminal: balance before and after, and the headline numbers."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from rich.console import Group
from rich.table import Table
from rich.text import Text

from moe_plugin.apps.report.summary import RunSummary
from moe_plugin.callbacks.load_monitor import LoadMonitor
from moe_plugin.metrics import LayerLoad, layer_loads


def run_report(summary: RunSummary, monitor: LoadMonitor, logs: Path | None) -> Group:
    """Return everything to show at the end of a run; print it with a `rich.console.Console`.

    Args:
        summary: The run's headline numbers.
        monitor: The run's monitor, after training.
        logs: The folder with TensorBoard events; None if there is none.
    """
    parts: list[Table | Text] = []
    after = monitor.validation_load or monitor.training_load
    if monitor.first_record is not None and after:
        before = layer_loads(monitor.first_record.counts)
        window = "validation" if monitor.validation_load else "last training steps"
        parts.append(balance_table(before, after, monitor.bias_ranges, window))
    parts.append(headline_table(summary))
    if logs is not None:
        parts.append(Text.assemble("\nTo look at the load: ", (tensorboard_command(logs), "bold cyan")))
    return Group(*parts)


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
        bias_ranges: The range of each layer's bias; may lack layers.
        window: What `after` was measured over, for the heading.
    """
    table = Table(title=f"Expert load: first step → {window}", title_justify="left", title_style="bold")
    table.add_column("layer", overflow="fold")
    for heading in ("MaxVio", "entropy", "dead experts", "bias range"):
        table.add_column(heading, justify="right")
    for name, last in after.items():
        table.add_row(name, *_changes(before[name], last), _number(bias_ranges.get(name), ".4f"))
    table.add_section()
    table.add_row(
        "all", *_overall(before, after), _number(max(bias_ranges.values(), default=None), ".4f"), style="bold"
    )
    return table


def headline_table(summary: RunSummary) -> Table:
    """Return the measures of a run, one in a line."""
    table = Table(title="Summary", title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    rows = {
        "validation loss": _number(summary.val_loss, ".4f"),
        "perplexity": _number(summary.perplexity, ".3f"),
        "MaxVio, whole validation set": _number(summary.max_violation_global, ".3f"),
        "MaxVio, per batch": _number(summary.max_violation_batch, ".3f"),
        "dead experts": _number(summary.dead_experts, "d"),
        "tokens per second": _number(summary.tokens_per_second, ",.0f"),
        "seconds": _number(summary.seconds, ",.1f"),
        "parameters, total": _number(summary.parameters_total, ",d"),
        "parameters, active per token": _number(summary.parameters_active, ",d"),
        "experts per token": f"{_number(summary.mean_experts_per_token, '.3f')}, "
        f"target {_number(summary.target_experts_per_token, 'g')}",
        "FLOPs per token, forward": _number(summary.active_flops_per_token, ",.0f"),
        "seed": _number(summary.seed, "d"),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def tensorboard_command(logs: Path) -> str:
    """Return the command line that shows these logs, ready to be pasted into a shell."""
    folder = logs.resolve()
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    return shlex.join(["tensorboard", "--logdir", str(folder)])


def _changes(before: LayerLoad, after: LayerLoad) -> tuple[Text, Text, Text]:
    return (
        _change(before.max_violation_global, after.max_violation_global, ".2f", lower_is_better=True),
        _change(before.entropy, after.entropy, ".3f", lower_is_better=False),
        _change(before.dead_experts, after.dead_experts, "d", lower_is_better=True),
    )


def _overall(before: Mapping[str, LayerLoad], after: Mapping[str, LayerLoad]) -> tuple[Text, Text, Text]:
    first, last = (
        LayerLoad(
            max_violation_batch=fmean(load.max_violation_batch for load in loads.values()),
            max_violation_global=fmean(load.max_violation_global for load in loads.values()),
            entropy=fmean(load.entropy for load in loads.values()),
            dead_experts=sum(load.dead_experts for load in loads.values()),
            tokens_per_expert=(),
        )
        for loads in (before, after)
    )
    return _changes(first, last)


def _change(before: float, after: float, style: str, *, lower_is_better: bool) -> Text:
    better = after <= before if lower_is_better else after >= before
    return Text.assemble((f"{before:{style}} → ", "dim"), (f"{after:{style}}", "green" if better else "red"))


def _number(value: float | int | None, style: str) -> str:
    return "–" if value is None else f"{value:{style}}"  # noqa: RUF001
