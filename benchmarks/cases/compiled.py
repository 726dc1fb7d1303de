"""What balancing adds to a step whose layers are compiled, as by `strategy.compile=inductor`; needs a C++ compiler.

Two trainings take turns as in `overhead`, whose first row is the same in eager mode.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.cases.overhead import whole
from benchmarks.models import tiny_model
from benchmarks.row import Row
from moe_plugin.apps.models import LanguageModel


def rows(rounds: int = 60, batch: int = 16) -> Iterator[Row]:
    """Yield the step of the tiny model, with `batch` sequences of 256 tokens."""
    # Other fused kernels may round otherwise.
    yield whole(rounds, batch, "balanced step of tiny, compiled", compiled_model, tolerance=1e-3)


def compiled_model() -> LanguageModel:
    """Return the tiny model with compiled layers."""
    model = tiny_model()
    for layer in model.network.layers:
        layer.compile()
    return model
