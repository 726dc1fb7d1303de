"""Replace single torch calls while a host's own method runs: what adapters of odd routers are written with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode


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
