"""Memory of this process, as Linux counts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def resident(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most so far."""
    status = Path("/proc/self/status").read_text()
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def peak_mib(action: Callable[[], object]) -> float:
    """The most that an action had resident at once beyond what was resident before it, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    action()
    return (resident("VmHWM") - before) / 2**20
