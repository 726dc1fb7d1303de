"""Recognise blocks of experts without running them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from moe_plugin.attach.discovery.code_names import TOP_K, uses
from moe_plugin.attach.discovery.module_names import aliases, levels, shared_levels
from moe_plugin.attach.discovery.surroundings import Surroundings
from moe_plugin.experts.stacks import LISTS, own_stacks


def may_route(module: nn.Module) -> bool:
    """Return whether it looks like a block of experts, although it was not seen to select any."""
    named = Surroundings((("", module),)).has_experts()
    selects = uses(type(module), TOP_K) or has_gate_for_a_weight(module)
    return has_gate_for_a_stack(module) or (named and selects)


def experts_of(module: nn.Module) -> list[nn.Module]:
    """Return children that are two or more experts."""
    named = [(name, child) for name, child in module.named_children() if "expert" in name]
    return [child for name, child in named if "shared" not in name and is_stack(child)]


def has_gate_for_a_stack(module: nn.Module) -> bool:
    """Return whether it has a matrix with one row or column for each module of a list next to it."""
    return _has_matrix_of(module, {len(child) for child in module.children() if isinstance(child, LISTS)})


def has_gate_for_a_weight(module: nn.Module) -> bool:
    """Return whether it has a matrix with one row or column for each entry of a 3-D weight next to it."""
    return _has_matrix_of(module, {stack.size for stack in own_stacks(module) if stack.is_weight})


def _has_matrix_of(module: nn.Module, sizes: set[int]) -> bool:
    """Return whether a matrix in it has one of these sizes, which must be two or more."""
    several = sizes - {0, 1}
    return bool(several) and any(several & set(matrix.shape) for matrix in _matrices(module))


def _matrices(module: nn.Module) -> Iterator[Tensor]:
    """Yield the matrices in it, but not those of listed modules."""
    yield from (tensor for tensor in module.parameters(recurse=False) if tensor.dim() == 2)
    for child in module.children():
        if not isinstance(child, LISTS):
            yield from _matrices(child)


def is_stack(module: nn.Module) -> bool:
    """Return whether it is a list of two or more, or it or a child holds two or more stacked weights."""
    parts = [module] if isinstance(module, LISTS) else [module, *module.children()]
    return any(stack.size > 1 for part in parts for stack in own_stacks(part))


def without_router(
    model: nn.Module, blocks: Sequence[str], holders: set[str], routers: Sequence[str]
) -> list[str]:
    """Return the blocks that have no router near them, except routers that are nearer to other experts.

    Args:
        model: Any model.
        blocks: Names of blocks of experts.
        holders: Names of all modules that hold experts.
        routers: Names of the routers found.
    """
    names = aliases(model)
    known = [alias for router in routers for alias in names[router]]
    nearest = {
        router: max((shared_levels(router, block) for block in holders), default=0) for router in known
    }
    lonely = []
    for name in blocks:
        reach = len(levels(Surroundings.of(model, name).path[-1][0]))
        near = [router for router in nearest if shared_levels(router, name) >= reach]
        if not any(shared_levels(router, name) == nearest[router] for router in near):
            lonely.append(name)
    return lonely
