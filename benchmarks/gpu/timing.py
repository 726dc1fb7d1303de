"""Times on a GPU, and in a rehearsal the same calls by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.gpu.place import Place

WARM_UP = 3
MOST_SECONDS = 4.0
"""After so long no further round begins, once there are enough for a median."""
FEWEST = 3


def median_ms(place: Place, call: Callable[[], object], rounds: int = 20) -> float:
    """Return the median milliseconds of a call on the device, each with a cold L2 cache.

    Args:
        place: Where.
        call: What to time.
        rounds: Calls, or fewer if they take long.
    """
    rounds, end = place.size(rounds, 1), time.monotonic() + MOST_SECONDS
    for _ in range(place.size(WARM_UP, 1)):
        call()
    timed = _milliseconds_on_cpu if place.dry else _device_timer()
    times: list[float] = []
    while len(times) < rounds and (len(times) < FEWEST or time.monotonic() < end):
        times.append(timed(call))
    return statistics.median(times)


def microseconds_per_call(place: Place, call: Callable[[], object], calls: int = 300) -> float:
    """Return the wall time of a call among many, until the device has done all: of host or device, what is slower.

    Args:
        place: Where.
        call: What to time.
        calls: How many in a row.
    """
    calls = place.size(calls, 2)
    place.wait()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    place.wait()
    return 1e6 * (time.perf_counter() - begin) / calls


def extra_microseconds(
    place: Place, call: Callable[[], object], without: Callable[[], object], turns: int = 9
) -> tuple[float, float]:
    """Return the median microseconds of a call, and what it takes more than another; both take turns.

    Args:
        place: Where.
        call: What to time.
        without: The same without what is measured.
        turns: Pairs of many calls each.
    """
    for _ in range(place.size(20, 1)):
        call()
        without()
    pairs = [
        (microseconds_per_call(place, call), microseconds_per_call(place, without))
        for _ in range(place.size(turns, 1))
    ]
    return statistics.median(one for one, _ in pairs), statistics.median(one - other for one, other in pairs)


def _milliseconds_on_cpu(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def _device_timer() -> Callable[[Callable[[], object]], float]:
    cache_bytes = getattr(torch.cuda.get_device_properties(), "L2_cache_size", 2**26)
    flush = torch.empty(4 * cache_bytes, dtype=torch.uint8, device="cuda")

    def timed(call: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()  # It also gives the host time to send what comes.
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    return timed
