"""Finding the repeated layers of any model by its structure, without running it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def find_layers(model: nn.Module) -> list[nn.Module]:
    """Find the blocks that the model repeats, in the order in which it holds them.

    These are the members of a `ModuleList`, `ModuleDict` or `Sequential` that hold modules themselves and whose class
    occurs there again, or the only member of a `ModuleList`. Lists inside a layer are part of it. Modules named after
    experts are not searched: which of them run differs between ranks, which must run their units in step.

    Args:
        model: Any model, on any device including meta.

    Returns:
        The layers; none if nothing is repeated.
    """
    return list(_layers_in(model))


def _layers_in(module: nn.Module) -> Iterator[nn.Module]:
    for name, child in module.named_children():
        if "expert" in name.lower():
            continue
        blocks = _repeated(child) if isinstance(child, CONTAINERS) else []
        if blocks:
            yield from blocks
        else:
            yield from _layers_in(child)


def _repeated(container: nn.Module) -> list[nn.Module]:
    members = list(container.children())
    if isinstance(container, nn.ModuleList) and len(members) == 1:
        return [member for member in members if _holds_modules(member)]
    occurrences = Counter(type(member) for member in members)
    return [member for member in members if occurrences[type(member)] > 1 and _holds_modules(member)]


def _holds_modules(module: nn.Module) -> bool:
    return next(module.children(), None) is not None
