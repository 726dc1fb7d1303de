"""How often the host waits for the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.place import Place

_WAITING_OPERATIONS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")


class Waits:
    """A counter.

    Attributes:
        count: Waits so far.
    """

    count = 0


def waits_of(place: Place, call: Callable[[], object]) -> int:
    """Return how often the host waits during a call, after it has been seen that waits are noticed.

    Args:
        place: Where.
        call: What to watch; it has run before.

    Raises:
        RuntimeError: A wait on purpose went unnoticed.
    """
    one = torch.ones((), device=place.device)
    with counted_waits(place) as known:
        one.item()
    if known.count != 1:
        raise RuntimeError(f"one wait on purpose must be counted as one, got {known.count}")
    with counted_waits(place) as waits:
        call()
    return waits.count


@contextmanager
def counted_waits(place: Place) -> Iterator[Waits]:
    """Count the waits in a block."""
    waits = Waits()
    if place.dry:
        with _WaitingOperations(waits):
            yield waits
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits.count = sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


class _WaitingOperations(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.waits.count += func.overloadpacket.__name__ in _WAITING_OPERATIONS
        return func(*args, **(kwargs or {}))
