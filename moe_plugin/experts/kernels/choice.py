"""Which kernels run on a GPU: pure torch, unless the environment variable `MOE_PLUGIN_KERNELS` says `triton`.

Off by default, since nobody has measured yet on a GPU what they gain.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from moe_plugin.errors import ConfigError
from moe_plugin.experts.kernels import permute

VARIABLE = "MOE_PLUGIN_KERNELS"


class Kernels(NamedTuple):
    """One implementation of each.

    Attributes:
        permute: See `moe_plugin.experts.kernels.permute`.
        unpermute: See `moe_plugin.experts.kernels.permute`.
    """

    permute: Callable[..., Tensor]
    unpermute: Callable[..., Tensor]


TORCH = Kernels(permute.permute, permute.unpermute)


def kernels_for(device: torch.device) -> Kernels:
    """Return the kernels to run on this device. Triton's are for GPUs only, whatever the variable says.

    Raises:
        ConfigError: The variable names no kernels.
    """
    return triton_kernels() if _chosen() == "triton" and device.type == "cuda" else TORCH


def triton_kernels() -> Kernels:
    """Return those in Triton; imports it."""
    from moe_plugin.experts.kernels import permute_triton

    return Kernels(permute_triton.permute, permute_triton.unpermute)


def check_choice() -> None:
    """Check the variable, before anything is created: wherever our experts are made, or take the place of others.

    Raises:
        ConfigError: It names no kernels, or Triton is asked for and not installed.
    """
    if _chosen() == "triton" and find_spec("triton") is None:
        raise ConfigError(
            f"'{VARIABLE}' must be torch where Triton is not installed, got 'triton'. "
            "Install it: pip install 'moe_plugin[triton]'."
        )


def _chosen() -> str:
    """Return the only reader of the variable, so that a misspelt one is nowhere taken for another."""
    chosen = os.environ.get(VARIABLE, "torch")
    if chosen not in ("torch", "triton"):
        raise ConfigError(f"'{VARIABLE}' must be torch or triton, got {chosen!r}. Unset it for torch.")
    return chosen
