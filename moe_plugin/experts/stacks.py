"""What can hold the experts of any model: a list of modules, or weights with one more dimension than a matrix.

All searches for experts use these definitions. Each adds what it needs to know: which router they belong to, how many a
token uses, whether ranks can share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class Stack(NamedTuple):
    """Things of which a module holds several alike.

    Attributes:
        size: How many.
        tensors: Their parameters: all of those in a list, or the one 3-D weight.
        is_weight: Whether they are one weight (E, ., .).
    """

    size: int
    tensors: Sequence[Tensor]
    is_weight: bool


def own_stacks(module: nn.Module) -> list[Stack]:
    """Return what a module itself stacks: its entries if it is a list, and its own 3-D weights."""
    listed = (
        [Stack(len(module), list(module.parameters()), is_weight=False)] if isinstance(module, LISTS) else []
    )
    weights = [each for each in module._parameters.values() if each is not None and each.dim() == 3]
    return [*listed, *(Stack(len(weight), [weight], is_weight=True) for weight in weights)]


def has_experts_in_weights(module: nn.Module, num_experts: int) -> bool:
    """Return whether a module has a 3-D weight with one entry per expert.

    Args:
        module: Any module.
        num_experts: How many experts.
    """
    return any(stack.is_weight and stack.size == num_experts for stack in own_stacks(module))


def num_experts_in(module: nn.Module) -> int | None:
    """Return how many experts a module holds if all that it stacks is as many; None if it stacks nothing or differs."""
    sizes = {stack.size for stack in own_stacks(module)}
    return sizes.pop() if len(sizes) == 1 else None
