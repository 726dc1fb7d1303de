"""Memory of this process."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile


def resident(field: str) -> int:
    """Return the bytes of this process, as Linux counts them: `VmRSS` now, `VmHWM` at most so far."""
    status = Path("/proc/self/status").read_text()
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def peak_mib(action: Callable[[], object]) -> float:
    """Return the most that tensors held during an action beyond what they held before it, in MiB."""
    return max(held_bytes(action)) / 2**20


def held_bytes(action: Callable[[], object]) -> list[int]:
    """Return what tensors hold beyond what they held before an action: at its start, and after each allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        action()
    results: Any = recorded.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
    changes = [event for event in results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())  # They come thread by thread.
    return list(accumulate((event.nbytes() for event in changes), initial=0))
