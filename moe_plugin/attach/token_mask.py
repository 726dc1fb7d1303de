"""Which tokens count: those that the model's mask argument does not mark as padding.

Shape legend: B batch, S sequence, T tokens (B x S).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.utils.hooks import RemovableHandle

from moe_plugin.attach.discovery.module_names import inside
from moe_plugin.errors import EffectError

_INPUTS = ("input_ids", "inputs_embeds")
_CROSS = "encoder_hidden_states"


class TokenMask:
    """The mask of the forward pass that is running, shared by the sites of a model.

    A model that holds models, such as an encoder and a decoder or a vision tower and a language model, gives each its
    own mask, so a site uses the mask of the innermost model around it. Sites next to the inner models, such as those
    of a vision tower, see tokens that the mask does not describe: all of them count.
    """

    def __init__(self, argument: str) -> None:
        """Take the mask from the forward argument of this name.

        Args:
            argument: Name of a (B, S) argument, non-zero for real tokens.
        """
        self.argument = argument
        self.mask_BS: Tensor | None = None
        self._watched: list[str] = []
        self._handles: list[RemovableHandle] = []

    def watch_(self, root: nn.Module) -> None:
        """Follow the argument of the outermost modules that take it, and of the models inside them."""
        for name, module in root.named_modules():
            if isinstance(module, ScriptModule):  # no signature, and no hooks with keywords
                continue
            own = "forward" in module.__dict__
            parameters = _parameters(module.forward) if own else _parameters_of(type(module))
            if self.argument not in parameters:
                continue
            if inside(name, self._watched) and not any(taken in parameters for taken in _INPUTS):
                continue
            self._watched.append(name)
            watch = _Watch(self, parameters.index(self.argument))
            self._handles.append(module.register_forward_pre_hook(watch.enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(watch.leave, always_call=True))

    def unwatch_(self) -> None:
        """Undo `watch_`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._watched.clear()

    def for_tokens(self, num_tokens: int, site: str) -> Tensor | None:
        """Return the mask over the tokens of one router call; bool (T,) or None when all tokens are real.

        Args:
            num_tokens: Tokens that the router sees.
            site: The router's name.

        Raises:
            EffectError: If the router sees more tokens than the mask describes.
        """
        if self.mask_BS is None:
            return None
        if num_tokens == self.mask_BS.numel():
            return self.mask_BS.reshape(-1) != 0
        if num_tokens < self.mask_BS.numel():  # a router of some tokens only, such as those of one modality
            return None
        batch, length = self.mask_BS.shape
        raise EffectError(
            f"'{self.argument}' has shape ({batch}, {length}), but router {site!r} sees {num_tokens} "
            "tokens. Name the right argument with 'mask', or None to count every token."
        )

    def describes(self, site: str) -> bool:
        """Return whether the mask describes the site's tokens: the innermost model around it holds none with one."""
        around = max((name for name in self._watched if inside(site, [name])), key=len, default="")
        return not any(name != around and inside(name, [around]) for name in self._watched)


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


@cache
def _parameters_of(kind: type[nn.Module]) -> list[str]:
    return _parameters(kind.forward)[1:]


class _Watch:
    """The hooks of one module."""

    def __init__(self, token_mask: TokenMask, position: int) -> None:
        self.token_mask = token_mask
        self.position = position
        self.outer: list[Tensor | None] = []

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        value = kwargs.get(self.token_mask.argument)
        if value is None and len(args) > self.position:
            value = args[self.position]
        self.outer.append(self.token_mask.mask_BS)
        if isinstance(value, Tensor) and value.dim() == 2:
            self.token_mask.mask_BS = _of_new_tokens(value, args, kwargs)
        elif kwargs.get(_CROSS) is not None:  # a decoder without a mask must not use the encoder's
            self.token_mask.mask_BS = None

    def leave(self, *_: Any) -> None:
        self.token_mask.mask_BS = self.outer.pop()


def _of_new_tokens(mask_BS: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Return the last columns of the mask: with a key-value cache it also covers tokens of earlier calls."""
    given = [kwargs.get(name) for name in _INPUTS]
    inputs = [x for x in (*given, *args) if isinstance(x, Tensor) and x.dim() >= 2 and len(x) == len(mask_BS)]
    length = inputs[0].shape[1] if inputs else mask_BS.shape[1]
    return mask_BS[:, -length:] if length < mask_BS.shape[1] else mask_BS
