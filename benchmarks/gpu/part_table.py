"""The parts of a run, in their order, and how much of the time each may take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module

from benchmarks.gpu.line import Line
from benchmarks.gpu.place import Place


@dataclass(frozen=True)
class Part:
    """A part: the file of its name in `benchmarks/gpu/parts`.

    Attributes:
        name: Of the file.
        title: Of its table.
        share: Of the time; what a part leaves over goes to those after it.
    """

    name: str
    title: str
    share: int

    def lines(self, place: Place) -> Iterator[Line]:
        """Return what is measured."""
        return import_module(f"benchmarks.gpu.parts.{self.name}").lines(place)


PARTS = (
    Part("skipped_tests", "Tests that a CPU skips", 80),
    Part("strategies", "Strategies: 20 steps of `small`, saved, resumed to 24", 150),
    Part("layer", "The expert layer, forward and backward of 32,768 tokens in bf16", 100),
    Part("routers", "Balancing: routers, the update, and callbacks", 90),
    Part("step", "A whole step", 130),
    Part("memory", "Memory: the plan and the device", 30),
    Part("kernels", "Kernels alone", 20),
)
