"""The most memory that a piece of work takes, if that can be known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CLEAR_PEAK = "5"  # proc(5): sets the peak resident size to the present one


class PeakMemory:
    """Peaks above what was in use at first: on a GPU of torch's tensors, on a CPU of the process.

    A process may keep what it frees. So on a CPU a peak is exact only while peaks rise.
    """

    def __init__(self, device: torch.device) -> None:
        """Remember what is in use now."""
        self._device = device
        self._before = self._bytes("VmRSS", torch.cuda.memory_allocated)

    def of(self, work: Callable[[], object]) -> int | None:
        """Do the work.

        Returns:
            Bytes; None on a device or a system that does not report them.
        """
        is_known = self._reset_()
        work()
        peak = self._bytes("VmHWM", torch.cuda.max_memory_allocated) if is_known else None
        return None if peak is None or self._before is None else max(0, peak - self._before)

    def _reset_(self) -> bool:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return True
        try:
            _CLEAR.write_text(_CLEAR_PEAK)
        except OSError:  # not Linux, or not allowed in this container
            return False
        return True

    def _bytes(self, field: str, of_gpu: Callable[[torch.device], int]) -> int | None:
        if self._device.type == "cuda":
            return of_gpu(self._device)
        if self._device.type != "cpu" or not _STATUS.exists():
            return None
        lines = _STATUS.read_text().splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field)), None)
