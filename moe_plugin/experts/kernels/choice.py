"""Which kernels run on a GPU: pure torch, unless the environment variable `MOE_PLUGIN_KERNELS` is `triton`.

Triton is off by default, as its gain has not been measured yet; docs/speed.md has the command.
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
    """Return the kernels for this device; Triton's are for GPUs only.

    Raises:
        ConfigError: The variable names no kernels.
    """
    return triton_kernels() if _chosen() == "triton" and device.type == "cuda" else TORCH


def triton_kernels() -> Kernels:
    """Return those in Triton; imports it."""
    from moe_plugin.experts.kernels import permute_triton

    return Kernels(permute_triton.permute, permute_triton.unpermute)


def check_choice() -> None:
    """Check the variable, before anything is created: wherever our experts are made, or replace others.

    Raises:
        ConfigError: It names no kernels, or Triton, which is not installed.
    """
    if _chosen() == "triton" and find_spec("triton") is None:
        fix = "Install it: pip install 'moe_plugin[triton]'."
        raise ConfigError(VARIABLE, "must be torch without Triton", "triton", fix)


def _chosen() -> str:
    """Read the variable; the rest of the package asks here."""
    chosen = os.environ.get(VARIABLE, "torch")
    if chosen not in ("torch", "triton"):
        raise ConfigError(VARIABLE, "must be torch or triton", chosen, "Unset it for torch.")
    return chosen
