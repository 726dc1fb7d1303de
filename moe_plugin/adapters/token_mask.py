"""Which tokens count: padding, as the model is told of it by its mask argument, does not.

Shape legend: B batch, S sequence, T tokens (B x S).
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moe_plugin.errors import EffectError


class TokenMask:
    """The mask of the forward pass that is running, shared by the sites of a model."""

    def __init__(self, argument: str) -> None:
        """Take the mask from the forward argument of this name.

        Args:
            argument: Name of a (B, S) argument, non-zero for real tokens.
        """
        self.argument = argument
        self.mask_BS: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def watch_(self, root: nn.Module) -> None:
        """Follow the argument of the outermost modules that take it."""
        outermost: list[str] = []
        for name, module in root.named_modules():
            inside = any(name.startswith(f"{outer}." if outer else "") for outer in outermost)
            if not inside and self.argument in inspect.signature(module.forward).parameters:
                outermost.append(name)
                self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def unwatch_(self) -> None:
        """Undo `watch_`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def for_tokens(self, num_tokens: int, site: str) -> Tensor | None:
        """The mask over the tokens of one router call; bool (T,) or None when all tokens are real.

        Raises:
            EffectError: If the mask cannot be of these tokens.
        """
        if self.mask_BS is None:
            return None
        batch, length = self.mask_BS.shape
        if num_tokens % batch or num_tokens // batch > length:
            raise EffectError(
                f"'{self.argument}' has shape ({batch}, {length}), but router {site!r} sees {num_tokens} "
                "tokens. Name the right argument with 'mask', or None to count every token."
            )
        # With a key-value cache the mask also covers the past: the tokens of this call are its last columns.
        return self.mask_BS[:, length - num_tokens // batch :].reshape(-1) != 0

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        value = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.get(self.argument)
        self.mask_BS = value if isinstance(value, Tensor) and value.dim() == 2 else None

    def _leave(self, *_: Any) -> None:
        self.mask_BS = None
