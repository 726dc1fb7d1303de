"""What follows from the figures, by rules that were written down before there were any."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gpu.goals import SHAPES
from benchmarks.gpu.results import Results

GAIN = 0.95
"""Share of the time with torch's permutes that Triton's must reach on one shape; on no shape may they take longer."""
WAITING_GAIN = 0.9
"""Share of the other implementation's time that one that waits for the device must reach."""
RULES = f"""\
- **Triton's permutes** become the default if the layer's step in bf16 takes at most {GAIN} of its time with torch's on
  one shape at least, and at most 1.0 on every shape. Otherwise they stay off. A shape that fails counts against Triton.
- **Implementations**: each dtype takes the faster one of "grouped products" and "a product per expert", for the
  capability that was measured. One that waits for the device must take at most {WAITING_GAIN} of the other's time.
  Other capabilities keep what they have.
- Results outside the tolerance of fp32 are failures. A failure is never taken.
"""
NOT_YET = "not measured"


def decisions(results: Results) -> Iterator[tuple[str, str]]:
    """Yield each question and its answer."""
    yield "Triton's permutes", _triton(results)
    for dtype in ("bf16", "fp16", "fp32"):
        yield f"experts in {dtype}", _implementation(results, dtype)


def _triton(results: Results) -> str:
    ratios = [results.ratio("layer", f"{shape}: ours, triton", f"{shape}: ours, torch") for shape in SHAPES]
    known = [ratio for ratio in ratios if ratio is not None]
    if not known:
        return NOT_YET
    wins = len(known) == len(ratios) and max(known) <= 1.0 and min(known) <= GAIN
    return f"{'on' if wins else 'off'} by default: {', '.join(f'{ratio:.2f}' for ratio in known)} of torch's time"


def _implementation(results: Results, dtype: str) -> str:
    names = ("grouped products", "a product per expert")
    found = {name: results.get("layer", f"B in {dtype}: {name}", "ms") for name in names}
    times = {name: milliseconds for name, milliseconds in found.items() if milliseconds is not None}
    if not times:
        return NOT_YET
    waits = {name: bool(results.get("layer", f"B in {dtype}: {name}", "waits")) for name in times}
    best = min(times, key=lambda name: times[name] / (WAITING_GAIN if waits[name] else 1.0))
    return f"{best}: {', '.join(f'{name} {times[name]:.3g} ms' for name in times)}"
