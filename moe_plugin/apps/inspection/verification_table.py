"""The results of the checks as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from moe_plugin.apps.received.printable import printable
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
        table.add_row(result.name, f"[{style}]{result.status}[/]", Text(printable(result.detail)))
    return table
