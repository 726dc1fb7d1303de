"""Finding the routed experts of any model by its structure, without running it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from moe_plugin.attach.discovery.understand import TOP_K_NAMES
from moe_plugin.errors import ConfigError
from moe_plugin.experts.stacks import num_experts_in
from moe_plugin.types import AllocatesExperts


@dataclass(frozen=True)
class RoutedExperts:
    """The experts of one layer, of which each token uses some.

    Attributes:
        module: Holds their parameters and no others.
        num_experts: Experts.
        top_k: Experts per token, on average if their number varies.
    """

    module: nn.Module
    num_experts: int
    top_k: float

    @property
    def num_parameters(self) -> int:
        """Parameters of all experts."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    @property
    def num_active_parameters(self) -> int:
        """Parameters that take part for one token."""
        return int(self.num_parameters * self.top_k // self.num_experts)


def find_routed_experts(model: nn.Module) -> list[RoutedExperts]:
    """Find each `ModuleList` of experts, or module of stacked (E, ., .) weights, with a router next to it.

    The router is a sibling that holds a matrix with one row per expert.

    Args:
        model: Any model, the meta device included.

    Raises:
        ConfigError: If the number of experts per token is not found next to some experts.
    """
    return [
        RoutedExperts(child, num_experts, _top_k(block, child, f"{path}.{name}".lstrip(".")))
        for path, block in model.named_modules()
        for name, child in block.named_children()
        if (num_experts := num_experts_in(child)) is not None and _has_router(block, child, num_experts)
    ]


def _has_router(block: nn.Module, experts: nn.Module, num_experts: int) -> bool:
    return any(
        parameter.ndim == 2 and num_experts in (parameter.shape[0], _num_routed(sibling))
        for sibling in block.children()
        if sibling is not experts
        for parameter in sibling.parameters()
    )


def _num_routed(router: nn.Module) -> int | None:
    return router.allocation().num_routed if isinstance(router, AllocatesExperts) else None


def _top_k(block: nn.Module, experts: nn.Module, path: str) -> float:
    for owner in _owners(block, experts):
        if isinstance(owner, AllocatesExperts):
            return owner.allocation().target_k
        for name in TOP_K_NAMES:
            value = getattr(owner, name, None)
            if isinstance(value, int | float):
                return value
    rule = f"must have the number of experts per token next to it, as one of {', '.join(TOP_K_NAMES)}"
    raise ConfigError(path, rule, None, "Set 'top_k' on its router.")


def _owners(block: nn.Module, experts: nn.Module) -> Iterator[object]:
    """Yield the objects that may hold top_k, the nearest to the router first."""
    modules = [*(child for child in block.children() if child is not experts), block, experts]
    yield from modules
    yield from (config for module in modules if (config := getattr(module, "config", None)) is not None)
