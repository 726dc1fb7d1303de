"""What FSDP2 gathers at once, and the share of it that a rank holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from moe_plugin.attach.discovery.understand import BIAS_NAMES
from moe_plugin.sharding import find_layers


class Weight(NamedTuple):
    """A parameter in numbers.

    Attributes:
        size: Bytes.
        shape: Its shape.
        is_trained: Whether it has a gradient.
    """

    size: int
    shape: tuple[int, ...]
    is_trained: bool

    def shard(self, ranks: int, *, by_width: bool) -> int:
        """Return the bytes of the largest shard: FSDP2 splits a dimension into equal parts; the last may be empty.

        Args:
            ranks: Ranks that it is split over.
            by_width: Whether to split the second dimension if its size allows.
        """
        width = by_width and self.shape[1] % ranks == 0
        rows = self.shape[1 if width else 0]
        return self.size // rows * -(-rows // ranks)


@dataclass(frozen=True)
class Unit:
    """A part of a model that `fully_shard` is called on.

    Attributes:
        weights: Its parameters, without those of units inside it.
        by_width: Whether the second dimension is split if it can be, as that of experts is.
    """

    weights: tuple[Weight, ...]
    by_width: bool = False

    @property
    def size(self) -> int:
        """Bytes of all parameters."""
        return sum(weight.size for weight in self.weights)

    @property
    def trained_size(self) -> int:
        """Bytes of the parameters that have gradients."""
        return sum(weight.size for weight in self.weights if weight.is_trained)

    def shard(self, ranks: int) -> int:
        """Return the bytes of the largest shard."""
        return sum(weight.shard(ranks, by_width=self.by_width) for weight in self.weights)

    def trained_shard(self, ranks: int) -> int:
        """Return the bytes of the largest shard of the parameters that have gradients."""
        trained = (weight for weight in self.weights if weight.is_trained)
        return sum(weight.shard(ranks, by_width=self.by_width) for weight in trained)


def modules_of_units(model: nn.Module, experts: Sequence[nn.Module] = ()) -> list[nn.Module]:
    """Return the modules that are units: the model and its layers, as in `shard_`, and experts.

    Args:
        model: Any model.
        experts: The expert layers under expert parallelism.
    """
    return [model, *find_layers(model), *experts]


def units_of(modules: Sequence[nn.Module], experts: Sequence[nn.Module] = ()) -> list[Unit]:
    """Return the units of `modules_of_units`: a parameter belongs to the last that holds it, selection biases to none.

    Args:
        modules: What `modules_of_units` returns.
        experts: See `modules_of_units`.
    """
    biases = {p for name, p in modules[0].named_parameters() if name.rpartition(".")[2] in BIAS_NAMES}
    owner = {p: number for number, module in enumerate(modules) for p in module.parameters()}
    return [
        Unit(_weights(p for p, n in owner.items() if n == number and p not in biases), module in experts)
        for number, module in enumerate(modules)
    ]


def _weights(parameters: Iterable[nn.Parameter]) -> tuple[Weight, ...]:
    return tuple(Weight(p.numel() * p.element_size(), tuple(p.shape), p.requires_grad) for p in parameters)
