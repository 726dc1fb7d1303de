"""The arguments with which a router was probed, to call it again on random numbers of the same shapes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from moe_plugin.attach.discovery.probing.saved_parts import PLAIN


class Shape(NamedTuple):
    """A tensor without its values."""

    sizes: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def filled(self) -> Tensor:
        """Return normal random numbers; zeros if they must be integers, and True for bool."""
        if self.dtype.is_floating_point:
            # Its own generator: attaching must not change the numbers that the host draws.
            drawn = torch.randn(self.sizes, generator=torch.Generator().manual_seed(0))
            return drawn.to(self.device, self.dtype)
        fill = self.dtype == torch.bool
        return torch.full(self.sizes, fill, dtype=self.dtype, device=self.device)


class Example(NamedTuple):
    """A call, with a `Shape` in place of each tensor."""

    args: tuple
    kwargs: dict[str, Any]

    def filled(self) -> tuple[tuple, dict[str, Any]]:
        """Return arguments for such a call."""
        return tree_map_only(Shape, Shape.filled, tuple(self), is_leaf=lambda value: isinstance(value, Shape))


def example_of(args: tuple, kwargs: dict[str, Any]) -> Example | None:
    """Return the shapes of a call; None if it has arguments of other kinds than tensors and plain values.

    Args:
        args: Its arguments.
        kwargs: Its named arguments.
    """
    if not all(isinstance(leaf, Tensor) or type(leaf) in PLAIN for leaf in tree_leaves((args, kwargs))):
        return None
    shaped = tree_map_only(
        Tensor, lambda given: Shape(tuple(given.shape), given.dtype, given.device), (args, kwargs)
    )
    return Example(*shaped)
