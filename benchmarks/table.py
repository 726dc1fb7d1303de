"""Rows as a table in the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from benchmarks.row import Row


def as_table(title: str, rows: Iterable[Row]) -> Table:
    """Return the rows of a case as a table; a goal that is missed is red."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("what", "value", "quartiles", "goal", "ms", "MiB", "against"):
        table.add_column(column, justify="left" if column in ("what", "against") else "right")
    for row in rows:
        color = {None: "", True: "[green]", False: "[red]"}[row.is_met]
        quartiles = "" if row.low is None or row.high is None else f"{_short(row.low)} {_short(row.high)}"
        table.add_row(
            row.name,
            f"{color}{_short(row.value)} {row.unit}",
            quartiles,
            _short(row.goal),
            _short(row.milliseconds),
            _short(row.memory_mib),
            row.peer + (f" ({row.note})" if row.note else ""),
        )
    return table


def _short(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.4g}"
