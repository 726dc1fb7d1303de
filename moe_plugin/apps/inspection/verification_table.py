"""The results of the checks as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from moe_plugin.attach.verification.battery import CheckResult

_STYLES = {"passed": "green", "failed": "bold red", "skipped": "yellow"}


def verification_table(results: Sequence[CheckResult]) -> Table:
    """Return a line per check; print it with a `rich.console.Console`."""
    numbers = {status: sum(result.status == status for result in results) for status in _STYLES}
    caption = ", ".join(f"{number} {status}" for status, number in numbers.items() if number)
    table = Table(title="Checks", caption=caption, title_justify="left", caption_justify="left")
    table.add_column("check")
    table.add_column("result")
    table.add_column("detail", overflow="fold")
    for result in results:
        style = _STYLES[result.status]
        table.add_row(result.name, f"[{style}]{result.status}[/]", _escaped(result.detail))
    return table


def _escaped(text: str) -> str:
    """Keep rich from reading brackets as markup."""
    return text.replace("[", r"\[")
