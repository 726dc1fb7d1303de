"""What the figures are to be, and whether they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.gpu.results import Results

SHAPES = {"d=2048 h=768 E=128 k=8": 1.0, "A": 1.0, "B": 1.2, "C": 1.2}
"""How many times as fast as transformers' `grouped_mm` ours is to be on each shape."""
WIDE = next(iter(SHAPES))


class Goal(NamedTuple):
    """What is to be, the figure, and its bounds; no figure where there is none yet."""

    text: str
    figure: float | None
    least: float | None = None
    most: float | None = None

    @property
    def is_met(self) -> bool | None:
        """Whether the figure is within its bounds; None without one."""
        if self.figure is None:
            return None
        return (self.least is None or self.figure >= self.least) and (
            self.most is None or self.figure <= self.most
        )


def goals(results: Results) -> Iterator[Goal]:
    """Yield every goal with its figure."""
    failed = [results.get("skipped_tests", name, "failed") for name in results.names("skipped_tests")]
    yield Goal("tests that fail", sum(filter(None, failed)) if failed else None, most=0)
    yield Goal("largest distance of a loss from `single`'s, nats", _spread(results), most=0.1)
    for shape, least in SHAPES.items():
        ratio = results.ratio("layer", f"{shape}: grouped_mm", f"{shape}: ours, torch")
        yield Goal(f"layer, {shape}: times as fast as `grouped_mm`", ratio, least=least)
    share = results.ratio("layer", f"{WIDE}: products", f"{WIDE}: ours, torch")
    yield Goal(f"layer, {WIDE}: share of the rate of its products alone", share, least=0.7)
    for host in ("Qwen3-MoE", "DeepSeek-V3"):
        for mode, most in (("eager", 30.0), ("compiled", 5.0)):
            more = results.get("routers", f"{host}, {mode}", "us more")
            yield Goal(f"attached router of {host}, {mode}: us more", more, most=most)
    for model in ("small", "1B"):
        title = f"{model}, bf16-mixed: ours"
        ratio = results.ratio("step", f"{title}, balanced", title)
        more = None if ratio is None else 100 * (ratio - 1)
        yield Goal(f"balancing in a step of {model}, %", more, most=0.1)
        yield Goal(f"waits in a step of {model}", results.get("step", f"{title}, balanced", "waits"), most=0)
        ratio = results.ratio("step", f"{model}, bf16-mixed: transformers", title)
        yield Goal(f"step of {model}: times as fast as transformers", ratio, least=1.0)
    yield Goal("waits that the callbacks add to a fit between logged steps", _added_waits(results), most=0)
    for precision in ("bf16-mixed", "bf16-true"):
        ratio = results.get("memory", f"1B, {precision}", "planned / real")
        yield Goal(f"`moe-plan` of 1B, {precision}: of the real peak", ratio, least=0.9, most=1.1)


def _spread(results: Results) -> float | None:
    own = results.get("strategies", "single, bf16-mixed, eager", "loss at 20")
    losses = [results.get("strategies", name, "loss at 20") for name in results.names("strategies")]
    found = [loss for loss in losses if loss is not None]
    return None if own is None else max(abs(loss - own) for loss in found)


def _added_waits(results: Results) -> float | None:
    names = ("fit of small, LossFreeBalancing and LoadMonitor", "fit of small, no callback")
    found, own = (results.get("routers", name, "waits") for name in names)
    return None if found is None or own is None else found - own
