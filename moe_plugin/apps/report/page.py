"""One self-contained HTML page for a run or a comparison of runs: opening it fetches nothing.

Shape legend: L MoE layers, E experts (of the layer with the most).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_plugin.apps.received.printable import printable
from moe_plugin.apps.received.regular_file import read_json
from moe_plugin.apps.received.yaml_file import read_yaml
from moe_plugin.apps.report.cells import DASH, number_cell
from moe_plugin.apps.report.environment import read_environment
from moe_plugin.apps.report.expert_use import ground_rules, profiles, read_expert_use, used_view
from moe_plugin.apps.report.summary import CONFIG_FILE, SUMMARY_FILE
from moe_plugin.apps.report.svg_charts import COLORS, Line, line_chart, scatter_chart
from moe_plugin.callbacks.monitor.load_over_time import spread
from moe_plugin.errors import ConfigError
from moe_plugin.metrics import dead_experts, load_entropy, max_violation
from moe_plugin.plots.colors import load_colors, load_octaves
from moe_plugin.plots.run_data import RunData, Series, named, read_run
from moe_plugin.plots.token_strip import LEVELS

CURVES = {
    "Loss": ("train/loss", "val/loss"),
    "MaxVio in training": ("load/max_violation_global",),
    "Dead experts": ("load/dead_experts",),
    "Entropy of the load (1 is even)": ("load/entropy",),
    "Step time over ideal at 8 ranks of expert parallelism": ("load/slowdown_ep8",),
    "Router confidence": ("load/confidence",),
    "Share of choices that the bias flips": ("load/flip_rate",),
    "Largest bias range": ("load/bias_range",),
    "Choices kept since the validation before": ("val/kept_choices",),
    "Experts per token": ("load/experts_per_token", "val/experts_per_token"),
    "Budget error: experts per token over target, less 1": ("load/budget_error",),
}
"""Title of each chart, and the tags in it."""
TITLES = {
    "val_loss": "validation loss",
    "perplexity": "perplexity",
    "max_violation_global": "MaxVio global",
    "max_violation_batch": "MaxVio batch",
    "dead_experts": "dead experts",
    "tokens_per_second": "tokens/s",
    "seconds": "seconds",
    "parameters_total": "parameters",
    "parameters_active": "active",
    "mean_experts_per_token": "experts per token",
    "active_flops_per_token": "FLOPs per token",
}
"""Heading of each measure of `RunSummary` that is shown."""
FIRST = ("load/max_violation_global", "load/dead_experts", "load/entropy")
"""Curves that begin with the first step."""
PARTS = {"train": "training", "load": "training", "val": "validation"}
FRAMES = 16


@dataclass(frozen=True)
class ReportedRun:
    """The files of a run.

    Attributes:
        data: What it logged.
        summary: Its `summary.json`; empty without one.
        config: Its configuration, keys joined by dots; empty without one.
        environment: Its versions and machine; empty without them.
        use: What its experts specialise in; empty without it.
    """

    data: RunData
    summary: Mapping[str, Any]
    config: Mapping[str, str]
    environment: Mapping[str, str]
    use: Mapping[str, Any]


def read_runs(words: Sequence[str]) -> list[ReportedRun]:
    """Read runs, and all the jobs of sweeps.

    Args:
        words: Folders of runs or sweeps, or `label=folder`.

    Raises:
        ConfigError: A folder is missing, or has logged nothing, or two runs have one name.
    """
    runs = [job for word in words for job in _jobs(*named(word))]
    labels = [label for label, _ in runs]
    for place, label in enumerate(labels):
        if label in labels[:place]:
            raise ConfigError("RUN", "must have names that differ", label, "Write label=folder.")
    return [_read(label, folder) for label, folder in runs]


def _jobs(label: str, folder: Path) -> list[tuple[str, Path]]:
    """Return the labels and folders of a sweep's jobs, or of the run itself."""
    jobs = sorted(job.parent for job in folder.glob(f"**/{SUMMARY_FILE}") if job.parent != folder)
    if not jobs or (folder / SUMMARY_FILE).exists():
        return [(label, folder)]
    prefix = "" if label == folder.resolve().name else f"{label} "
    return [(f"{prefix}{job.relative_to(folder)}", job) for job in jobs]


def _read(label: str, folder: Path) -> ReportedRun:
    _check_logs(folder)
    data = read_run(label, folder)
    summary, config = folder / SUMMARY_FILE, folder / CONFIG_FILE
    return ReportedRun(
        data,
        _read_measures(summary) if summary.exists() else {},
        _flat(read_yaml(config, CONFIG_FILE)) if config.exists() else {},
        read_environment(folder),
        read_expert_use(folder),
    )


def _check_logs(folder: Path) -> None:
    """Check that no log is a pipe or a device, from which a reader would wait for ever."""
    for path in (*folder.rglob("events.out.tfevents.*"), *folder.rglob("metrics.csv")):
        if not path.is_file():
            raise ConfigError("RUN", "must have regular files for logs", str(path))


def _read_measures(path: Path) -> Mapping[str, Any]:
    measures = read_json(path, SUMMARY_FILE)
    for key in TITLES:
        if not isinstance(measures.get(key), int | float | None):
            raise ConfigError(SUMMARY_FILE, f"must have a number as {key}", str(path))
    return measures


def _flat(node: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(node, Mapping):
        return {prefix: printable(node)}
    flat: dict[str, str] = {}
    for name, child in node.items():
        flat |= _flat(child, f"{prefix}.{printable(name)}" if prefix else printable(name))
    return flat


def report_page(runs: Sequence[ReportedRun]) -> str:
    """Return the page of at least one run, as text."""
    from jinja2 import Environment, PackageLoader

    pages = Environment(loader=PackageLoader("moe_plugin.apps.report", "."), autoescape=True)
    pages.filters["visible"] = lambda text: text.replace("\n", "↵").replace("\t", "→").replace("\0", "·")
    template = pages.get_template("page.html")
    labels = [printable(run.data.label) for run in runs]
    return template.render(
        title=labels[0] if len(runs) == 1 else f"{len(runs)} runs",
        labels=labels,
        colors=[place % COLORS for place in range(len(runs))],
        charts=_charts(runs),
        scatter=_scatter(runs),
        strips=[_strip(run.data) for run in runs],
        table=_table(runs),
        measures=list(TITLES.values()),
        differences=_differences(runs),
        environments=_rows_of([run.environment for run in runs]),
        used=[used_view(run.use) for run in runs],
        profiles=profiles([run.use for run in runs]),
        ground_rules=ground_rules(),
        levels=LEVELS,
    )


@dataclass(frozen=True)
class Chart:
    """A chart as SVG, and the colour and name of each of its lines; no names if they are those of the runs."""

    svg: str
    legend: list[tuple[int, str]]


def _charts(runs: Sequence[ReportedRun]) -> dict[str, Chart]:
    curves = CURVES if len(runs) == 1 else {"Validation loss": ("val/loss",)} | CURVES
    charts = {title: _chart(runs, tags) for title, tags in curves.items() if len(runs) == 1 or len(tags) == 1}
    return {title: chart for title, chart in charts.items() if chart.svg}


def _chart(runs: Sequence[ReportedRun], tags: Sequence[str]) -> Chart:
    lines = {
        (place + shift) % COLORS: (run.data, tag)
        for place, run in enumerate(runs)
        for shift, tag in enumerate(tags)
        if tag in run.data.scalars
    }
    svg = line_chart(
        [
            Line(printable(f"{data.label} {tag}"), *_from_first_step(data, tag), color)
            for color, (data, tag) in lines.items()
        ],
        "optimizer step",
    )
    names = [(color, PARTS[tag.partition("/")[0]]) for color, (_, tag) in lines.items()]
    return Chart(svg, names if len(tags) > 1 else [])


def _from_first_step(run: RunData, tag: str) -> Series:
    """Return a curve that begins with the load of the first step, which is logged as counts only."""
    steps, values = run.scalars[tag]
    first, tokens_LE = next(iter(run.counts.get("load", [])), (steps[0], np.empty(0)))
    if tag not in FIRST or first >= steps[0]:
        return steps, values
    return [first, *steps], [_measures(tokens_LE)[tag], *values]


def _measures(tokens_LE: np.ndarray) -> dict[str, float]:
    """Return the measures of `FIRST` over all layers, of counts with -1 past the last expert of a layer."""
    tokens = torch.from_numpy(np.asarray(tokens_LE)).long()
    sizes_L, counts = (tokens >= 0).sum(-1), tokens.clamp(min=0)
    all_layers = (
        max_violation(counts, sizes_L).mean(),
        dead_experts(counts, sizes_L).sum(),
        load_entropy(counts, sizes_L).mean(),
    )
    return dict(zip(FIRST, map(float, all_layers), strict=True))


def _scatter(runs: Sequence[ReportedRun]) -> str:
    points = [
        Line(printable(run.data.label), [violation], [loss], color=place % COLORS)
        for place, run in enumerate(runs)
        if (loss := run.summary.get("val_loss")) is not None
        and (violation := run.summary.get("max_violation_global")) is not None
    ]
    title = "MaxVio over the validation set (0 is perfect balance)"
    return scatter_chart(points, title) if len(points) > 1 else ""


def _table(runs: Sequence[ReportedRun]) -> list[list[str]]:
    return [[number_cell(run.summary.get(key)) for key in TITLES] for run in runs]


def _differences(runs: Sequence[ReportedRun]) -> dict[str, list[str]]:
    """Return the configuration keys whose values differ between runs; all keys for a single run."""
    own = ("dirpath", "save_dir", "path")
    return {
        key: values
        for key, values in sorted(_rows_of([run.config for run in runs]).items())
        if not key.startswith("paths.")
        and (len(runs) == 1 or (len(set(values)) > 1 and key.rpartition(".")[2] not in own))
    }


def _rows_of(tables: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Return a row for each key, with its value in each of the tables."""
    keys = dict.fromkeys(key for table in tables for key in table)
    return {key: [table.get(key, DASH) for table in tables] for key in keys}


@dataclass(frozen=True)
class Frame:
    """A picture of a film strip: its title, the picture as a data address, its layers and experts, and its numbers."""

    title: str
    picture: str
    layers: int
    experts: int
    numbers: str


def _strip(run: RunData) -> list[Frame]:
    """Return the load at every window that was drawn, evenly chosen if there are many, then on the validation set."""
    loads = run.counts.get("load", [])
    shown = [loads[place] for place in spread(len(loads), FRAMES)]
    frames = [_frame(f"step {step + 1}", tokens_LE) for step, tokens_LE in shown]
    return frames + [_frame("validation", tokens_LE) for _, tokens_LE in run.counts.get("val", [])[-1:]]


def _frame(title: str, tokens_LE: np.ndarray) -> Frame:
    from PIL import Image

    tokens = torch.from_numpy(np.asarray(tokens_LE)).long()
    sizes_L = (tokens >= 0).sum(-1)
    violation, dead, _ = _measures(tokens_LE).values()
    file = io.BytesIO()
    Image.fromarray(load_colors(load_octaves(tokens, sizes_L))).save(file, format="PNG", optimize=True)
    picture = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    numbers = f"MaxVio {violation:.2f}" + (f", {dead:.0f} dead" if dead else "")
    return Frame(title, picture, len(tokens), tokens.shape[1], numbers)
