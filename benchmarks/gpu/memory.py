"""Memory of the device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu.place import Place
from benchmarks.memory import peak_mib as peak_mib_on_cpu


def peak_mib(place: Place, call: Callable[[], object]) -> float:
    """Return the most that tensors take during a call beyond what they take before it, in MiB.

    Args:
        place: Where.
        call: What to watch.
    """
    if place.dry:
        return peak_mib_on_cpu(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
