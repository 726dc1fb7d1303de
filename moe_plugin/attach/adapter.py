"""How to balance a block that selects experts in a way of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from moe_plugin.errors import ConfigError


@dataclass(frozen=True)
class Adapter:
    """Says how a class of blocks routes, in place of finding it out.

    ``route`` stands in for the block's ``method``. It is called as ``route(block, select, *args, **kwargs)`` and
    returns what the method would. ``select(scores_TE, k)`` takes the place of ``torch.topk``: it ranks by the scores
    plus the bias and returns the unbiased scores of the chosen experts, and their ids.

    Example:
        >>> def route(block, select, x_TD):
        ...     weights_TK, ids_TK = select(block.gate(x_TD).softmax(-1), block.k)
        ...     return weights_TK / weights_TK.sum(-1, keepdim=True), ids_TK
        >>> adapter = Adapter(block="OddBlock", route=route, num_experts="n", top_k="k")

    Attributes:
        block: The class, its name, or a predicate on the module.
        route: The block's routing, with ``select``; an importable function where the model is to be pickled.
        method: The block's method that ``route`` stands in for.
        num_experts: E, or the block's attribute that holds it, dots allowed.
        top_k: Experts selected per token, over all calls of ``select`` in one call of ``route``; likewise.
        refused: Why the block cannot be balanced; '' if it can.
    """

    block: type[nn.Module] | str | Callable[[nn.Module], bool]
    route: Callable[..., Any] | None = None
    method: str = "forward"
    num_experts: int | str = "num_experts"
    top_k: int | str = "top_k"
    refused: str = ""

    def __post_init__(self) -> None:
        """Check that it says one thing.

        Raises:
            ConfigError: Unless exactly one of 'route' and 'refused' is given.
        """
        if (self.route is None) == (not self.refused):
            raise ConfigError(
                f"'route' or 'refused' must be given, and not both, got {self.route} and {self.refused!r}."
            )

    def fits(self, module: nn.Module) -> bool:
        """Return whether this is a block of the kind."""
        if isinstance(self.block, str):
            return any(base.__name__ == self.block for base in type(module).__mro__)
        if isinstance(self.block, type):
            return isinstance(module, self.block)
        return self.block(module)

    def number(self, module: nn.Module, which: str) -> int:
        """Return ``num_experts`` or ``top_k`` of this block.

        Raises:
            ConfigError: If the block has no such number.
        """
        value: Any = getattr(self, which)
        if isinstance(value, str):
            path, value = value, module
            for name in path.split("."):
                value = getattr(value, name, None)
        if not isinstance(value, int):
            raise ConfigError(
                f"'{which}' of the adapter must lead to an integer, got {getattr(self, which)!r}, "
                f"which is {value!r} in {type(module).__name__}."
            )
        return value


class Replaced(TorchFunctionMode):
    """Gives calls of some torch functions to ``instead``, which may pass them on by returning None."""

    def __init__(self, functions: tuple[Callable, ...], instead: Callable[..., Any]) -> None:
        """Replace these functions, as long as the context is open."""
        super().__init__()
        self.functions = functions
        self.instead = instead

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Ask ``instead`` first."""
        result = self.instead(*args, **(kwargs or {})) if func in self.functions else None
        return func(*args, **(kwargs or {})) if result is None else result
