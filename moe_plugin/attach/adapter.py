"""How to balance a block whose routing is not found automatically."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from moe_plugin.errors import ConfigError


@dataclass(frozen=True)
class Adapter:
    """How a class of blocks routes.

    ``route`` replaces the block's ``method``. It is called as ``route(block, select, *args, **kwargs)`` and
    returns what the method would. ``select(scores_TE, k)`` takes the place of ``torch.topk``: it ranks by the scores
    plus the bias and returns the unbiased scores of the chosen experts, and their ids.

    If ``scores_TE`` carry noise or leave experts out, pass the router's own scores as well: ``select(scores_TE, k,
    plain_TE)``. They show how far apart the experts are, which ``rate: auto`` and some rules need. A call that only
    prepares the selection, as for a threshold, passes ``counts=False``.

    Examples:
        >>> def route(block, select, x_TD):
        ...     weights_TK, ids_TK = select(block.gate(x_TD).softmax(-1), block.k)
        ...     return weights_TK / weights_TK.sum(-1, keepdim=True), ids_TK
        >>> adapter = Adapter(block="OddBlock", route=route, num_experts="n", top_k="k")

    Attributes:
        block: The class, its name, or a predicate on the module.
        route: The block's routing, with ``select``; an importable function if the model will be pickled.
        method: The block's method that ``route`` replaces.
        num_experts: E, or the block's attribute that holds it, such as "n" or "gate.n".
        top_k: K, or its attribute: experts per token over all calls of ``select`` in one call of ``route``.
        refused: Why the block cannot be balanced; '' if it can.
    """

    block: type[nn.Module] | str | Callable[[nn.Module], bool]
    route: Callable[..., Any] | None = None
    method: str = "forward"
    num_experts: int | str = "num_experts"
    top_k: int | str = "top_k"
    refused: str = ""

    def __post_init__(self) -> None:
        """Check that there is a routing or a refusal.

        Raises:
            ConfigError: Unless exactly one of 'route' and 'refused' is given.
        """
        if (self.route is None) == (not self.refused):
            rule = f"must be given if and only if 'refused' is empty ({self.refused!r})"
            raise ConfigError("route", rule, self.route)

    def fits(self, module: nn.Module) -> bool:
        """Return whether this module is such a block."""
        if isinstance(self.block, str):
            return any(base.__name__ == self.block for base in type(module).__mro__)
        if isinstance(self.block, type):
            return isinstance(module, self.block)
        return self.block(module)

    def places(self, module: nn.Module) -> list[str]:
        """Return the attributes of this block that ``route`` replaces; [] if the method cannot be reached.

        Hooks put a callable of their own in the method's place, and may keep the method in another attribute, as
        accelerate does in ``_old_forward``.
        """
        own = getattr(type(module), self.method, None)
        if self.method not in vars(module):
            return [self.method]
        return [name for name, value in vars(module).items() if _is_bound(value, own, module)]

    def number(self, module: nn.Module, which: str) -> int:
        """Return ``num_experts`` or ``top_k`` of this block.

        Args:
            module: The block.
            which: The number's name.

        Raises:
            ConfigError: If the block has no such number.
        """
        value: Any = getattr(self, which)
        if isinstance(value, str):
            path, value = value, module
            for name in path.split("."):
                value = getattr(value, name, None)
        if not isinstance(value, int):
            rule = f"must be an integer or name one: {type(module).__name__} has {value!r} there"
            raise ConfigError(which, rule, getattr(self, which), "Correct the Adapter.")
        return value


def _is_bound(value: Any, function: Any, module: nn.Module) -> bool:
    return isinstance(value, MethodType) and value.__func__ is function and value.__self__ is module


class Replaced(TorchFunctionMode):
    """Mode that gives calls of some torch functions to another function."""

    def __init__(self, functions: tuple[Callable, ...], instead: Callable[..., Any]) -> None:
        """Replace these functions while the context is open.

        Args:
            functions: What is replaced.
            instead: Takes their arguments; returns the result, or None to call the function after all.
        """
        super().__init__()
        self.functions = functions
        self.instead = instead

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call ``instead`` first."""
        result = self.instead(*args, **(kwargs or {})) if func in self.functions else None
        return func(*args, **(kwargs or {})) if result is None else result
