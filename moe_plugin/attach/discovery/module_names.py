"""How names of modules lie to each other in a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn


def inner_first(
    module: nn.Module, name: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module once, after all that it holds, also where others hold them too."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    for child_name, child in module.named_children():
        yield from inner_first(child, f"{name}.{child_name}" if name else child_name, seen)
    yield name, module


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """Return all names of each module, by the first: layers may share one."""
    by_module: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        by_module.setdefault(id(module), []).append(name)
    return {names[0]: names for names in by_module.values()}


def levels(name: str) -> list[str]:
    """Return the parts of a name."""
    return name.split(".") if name else []


def shared_levels(one: str, other: str) -> int:
    """Return how many levels from the root two modules share."""
    pairs = zip(levels(one), levels(other), strict=False)
    return next(
        (depth for depth, (a, b) in enumerate(pairs) if a != b), min(len(levels(one)), len(levels(other)))
    )


def holds(name: str, others: Sequence[str]) -> bool:
    """Return whether one of the others is this module or inside it."""
    prefix = f"{name}." if name else ""
    return any(other == name or other.startswith(prefix) for other in others)


def inside(name: str, others: Sequence[str]) -> bool:
    """Return whether this module is one of the others or inside one."""
    return any(name == other or name.startswith(f"{other}." if other else "") for other in others)
