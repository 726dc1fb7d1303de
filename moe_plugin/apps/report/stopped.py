"""Why a run stopped early: `stopped.txt`, one line."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from moe_plugin.apps.received.regular_file import read_text
from moe_plugin.apps.report.atomic_write import write_atomically

STOPPED_FILE = "stopped.txt"


def write_stopped(folder: Path, line: str) -> None:
    """Write the reason into the run's folder, in one move, as `read_stopped` reads it.

    It is a copy of what was printed. Where nothing can be written, it is left out.
    """
    with suppress(OSError):
        write_atomically(folder / STOPPED_FILE, f"{line}\n")


def can_go_on(folder: Path) -> bool:
    """Return whether the run was stopped with a checkpoint to continue from."""
    return "ckpt_path=" in (read_stopped(folder) or "")


def read_stopped(folder: Path) -> str | None:
    """Read what `write_stopped` wrote; None if the run was not stopped."""
    path = folder / STOPPED_FILE
    return read_text(path, STOPPED_FILE).strip() if path.exists() else None
