"""The selection bias of a routing site: the host's own tensor if it has one, else our buffer.

Shape legend: E experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_plugin.attach.steering.class_swap import Mixin, swap_, unswap_
from moe_plugin.errors import BalanceWarning

OWN_NAME = "moe_plugin_bias"
"""Buffer added to routers that have no correction bias; persistent on request, so no state_dict key changes."""


class Fp32Bias(Mixin):
    """Mixin that keeps tensors of a module in fp32 through ``.to()``, ``.half()`` and ``to_empty``.

    In bf16 0.5 + 0.001 is 0.5, so a bias that was cast would stop moving.
    """

    _moe_bias_names: tuple[str, ...]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = {name: getattr(self, name).detach() for name in self._moe_bias_names}
        super()._apply(fn, recurse)  # pyright: ignore[reportAttributeAccessIssue]
        for name, before_E in before.items():
            moved_E = getattr(self, name)
            # A tensor made on the meta device has no values: the bias starts at zero, not at garbage.
            value_E = torch.zeros_like(before_E, device=moved_E.device) if before_E.is_meta else before_E
            moved_E.data = value_E.to(device=moved_E.device, dtype=torch.float32)
        return self  # pyright: ignore[reportReturnType]


class OwnBias(Mixin):
    """Mixin of a router with our buffer: it loads state dicts with the bias and without."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *given: Any) -> None:
        key, bias_E = prefix + OWN_NAME, getattr(self, OWN_NAME)
        is_persistent = OWN_NAME not in self._non_persistent_buffers_set  # pyright: ignore
        if is_persistent and key not in state_dict:
            _warn_of_missing(bias_E)
            state_dict[key] = bias_E
        elif key in state_dict and state_dict[key].shape == bias_E.shape:
            bias_E.copy_(state_dict[key])
            state_dict[key] = (
                bias_E  # not the saved tensor, which may be a cast one that ``assign`` would take
            )
            if not is_persistent:
                del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *given)  # pyright: ignore[reportAttributeAccessIssue]


def add_own_bias_(module: nn.Module, num_experts: int, device: torch.device, *, persistent: bool) -> None:
    """Register a zero fp32 bias (E,), and keep it fp32.

    Args:
        module: The router.
        num_experts: E.
        device: Where the router is.
        persistent: Whether it is in the model's ``state_dict``.
    """
    bias_E = torch.zeros(num_experts, dtype=torch.float32, device=device)
    module.register_buffer(OWN_NAME, bias_E, persistent=persistent)
    keep_fp32_(module, OWN_NAME)
    swap_(module, OwnBias)


def show_in_state_dict_(module: nn.Module, *, shown: bool) -> None:
    """Put the bias of `add_own_bias_` into the model's ``state_dict``, or leave it out.

    Args:
        module: The router.
        shown: Whether it is in there from now on.
    """
    hidden = module._non_persistent_buffers_set
    (hidden.discard if shown else hidden.add)(OWN_NAME)


def remove_own_bias_(module: nn.Module) -> None:
    """Undo `add_own_bias_`."""
    unswap_(module, OwnBias)
    release_fp32_(module, OWN_NAME)
    delattr(module, OWN_NAME)


def keep_fp32_(module: nn.Module, name: str) -> None:
    """Cast a tensor to fp32 and keep it there.

    Args:
        module: The module that owns it.
        name: The tensor's attribute.
    """
    tensor = getattr(module, name)
    tensor.data = tensor.data.float()
    names = module.__dict__.get("_moe_bias_names", ())
    module.__dict__["_moe_bias_names"] = (*names, name)
    if not names:
        swap_(module, Fp32Bias)


def release_fp32_(module: nn.Module, name: str) -> None:
    """Undo `keep_fp32_`, except for the dtype; arguments as `keep_fp32_`."""
    left = list(module.__dict__["_moe_bias_names"])
    left.remove(name)
    module.__dict__["_moe_bias_names"] = tuple(left)
    if not left:
        unswap_(module, Fp32Bias)
        del module.__dict__["_moe_bias_names"]


def _warn_of_missing(bias_E: Tensor) -> None:
    if bias_E.is_meta or not bias_E.any():
        warnings.warn(
            f"The state dict has no {OWN_NAME!r}, so the model continues from a bias of 0. It was saved without "
            "bias_in_state_dict=True, or without balancing; if it has biases, load them by balance_(...).load(path).",
            BalanceWarning,
            stacklevel=2,
        )
