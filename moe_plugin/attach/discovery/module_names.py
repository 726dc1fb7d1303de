"""How the names of modules in a model relate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile

from torch import nn


def inner_first(
    module: nn.Module, name: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module once, after all that it holds, with ``name`` and ``seen`` as `named_modules` has them."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    for child_name, child in module.named_children():
        yield from inner_first(child, f"{name}.{child_name}" if name else child_name, seen)
    yield name, module


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """Return all names of each module, by the first: layers may share modules."""
    by_module: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        by_module.setdefault(id(module), []).append(name)
    return {names[0]: names for names in by_module.values()}


def levels(name: str) -> list[str]:
    """Return the parts of a name."""
    return name.split(".") if name else []


def shared_levels(one: str, other: str) -> int:
    """Return how many levels from the root two modules share.

    Args:
        one: A name.
        other: Another name.
    """
    pairs = zip(levels(one), levels(other), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def holds(name: str, others: Sequence[str]) -> bool:
    """Return whether one of the others is this module or inside it.

    Args:
        name: A module's name.
        others: Other modules' names.
    """
    return any(inside(other, [name]) for other in others)


def inside(name: str, others: Sequence[str]) -> bool:
    """Return whether this module is one of the others or inside one; arguments as `holds`."""
    return any(name == other or name.startswith(f"{other}." if other else "") for other in others)
