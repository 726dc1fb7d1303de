"""The results of the jobs of a sweep: `sweep_summary.csv` and a ranked table."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from moe_plugin.apps.received.printable import printable
from moe_plugin.apps.received.yaml_file import read_yaml
from moe_plugin.apps.report.atomic_write import write_atomically
from moe_plugin.apps.report.cells import number_cell
from moe_plugin.apps.report.stopped import STOPPED_FILE, read_stopped
from moe_plugin.apps.report.summary import SUMMARY_FILE, RunSummary, read_summary
from moe_plugin.errors import ConfigError

SWEEP_FILE = "sweep_summary.csv"
FINISHED = "finished"
MEASURES = [field.name for field in fields(RunSummary)]
HIGHER_IS_BETTER = {"tokens_per_second"}


def gather_sweep(folder: Path) -> list[dict[str, Any]]:
    """Return one row for each job of a multirun folder that has ended, in the order of the jobs.

    Args:
        folder: Holds a folder per job with `summary.json`, or `stopped.txt` if the job failed or was stopped, and
            Hydra's `.hydra/overrides.yaml`.

    Returns:
        Rows with the keys `job`, `status` (`finished`, or the line of `stopped.txt`), each override's key, then the
        measures of `RunSummary`. All rows have the same keys in the same order; overrides that a job does not have
        and the measures of unfinished jobs are None.
    """
    ended = {path.parent for name in (SUMMARY_FILE, STOPPED_FILE) for path in folder.rglob(name)}
    jobs = [
        (job, overrides_of(job)) for job in sorted(ended, key=lambda job: _natural(job.relative_to(folder)))
    ]
    keys = list(dict.fromkeys(key for _, overrides in jobs for key in overrides if key not in MEASURES))
    return [
        {
            "job": str(job.relative_to(folder)),
            "status": read_stopped(job) or FINISHED,
            **{key: overrides.get(key) for key in keys},
            **_measures(job),
        }
        for job, overrides in jobs
    ]


def write_sweep_summary(folder: Path) -> Path | None:
    """Write `sweep_summary.csv` with all jobs that have ended so far into the multirun folder, in one move.

    Returns:
        The file; None if no job has ended.
    """
    rows = gather_sweep(folder)
    if not rows:
        return None
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = folder / SWEEP_FILE
    write_atomically(path, text.getvalue())
    return path


def sweep_table(folder: Path, metric: str = "val_loss") -> Table:
    """Return the jobs of a sweep, best first, with the overrides in which they differ.

    Args:
        folder: The multirun folder.
        metric: The key of `summary.json` to rank by.

    Raises:
        ConfigError: There is no such measure.
    """
    if metric not in MEASURES:
        raise ConfigError("metric", f"must be one of {', '.join(MEASURES)}", metric)
    rows = sorted(gather_sweep(folder), key=lambda row: _rank(row[metric], metric))
    title = Text(printable(f"{folder.name}: {len(rows)} jobs by {metric}"))
    table = Table(title=title, title_justify="left", title_style="bold")
    overrides = [key for key in (rows[0] if rows else {}) if key not in {"job", "status", *MEASURES}]
    swept = [key for key in overrides if len({row[key] for row in rows}) > 1]
    shown = [metric, *(key for key in MEASURES[:6] if key != metric)]
    table.add_column("job")
    for key in (*swept, *shown):
        table.add_column(
            Text(printable(key)),
            justify="right" if key in MEASURES else "left",
            style="bold" if key == metric else None,
        )
    table.add_column("status")
    for place, row in enumerate(rows):
        cells = [
            row["job"],
            *(str(row[key] or "") for key in swept),
            *(number_cell(row[key]) for key in shown),
        ]
        finished = row["status"] == FINISHED
        status = row["status"].split()[0].rstrip(":")
        table.add_row(
            *(Text(printable(cell)) for cell in (*cells, status)),
            style="red" if not finished else "green" if place == 0 else None,
        )
    return table


def _measures(job: Path) -> dict[str, Any]:
    path = job / SUMMARY_FILE
    return asdict(read_summary(path)) if path.exists() else dict.fromkeys(MEASURES)


def overrides_of(job: Path) -> dict[str, str]:
    """Return the overrides of a run or of a job of a sweep, without Hydra's signs."""
    path = job / ".hydra" / "overrides.yaml"
    lines = read_yaml(path, path.name) if path.exists() else []
    pairs = (str(line).lstrip("+~").partition("=") for line in lines if isinstance(lines, list))
    # Hydra needs quotes around an option that looks like a number: experts="8".
    return {key: value.strip("\"'") for key, _, value in pairs}


def _natural(path: Path) -> list[tuple[int, str]]:
    """Return a sort key that puts 2 before 10."""
    return [(int(digits or 0), text) for digits, text in re.findall(r"(\d*)(\D*)", str(path))]


def _rank(value: float | None, metric: str) -> tuple[bool, float]:
    if value is None:
        return True, 0.0
    return False, -value if metric in HIGHER_IS_BETTER else value
