"""The dtype that a layer gives, and the one its matrix products are computed in.

They differ on processors without instructions for half precision: torch emulates its products there, 3 to 23 times
slower than in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALVES = frozenset({torch.float16, torch.bfloat16})


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that a layer gives for this input: that of `x`, or of the autocast if one is active."""
    # Our operators do not know autocast, so it is asked for here. Like autocast itself, leave fp64 alone.
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of a layer's products: fp32 in place of an emulated half precision.

    Args:
        dtype: What the layer gives.
        device: Where it computes.
    """
    return torch.float32 if device.type == "cpu" and dtype in EMULATED_BY_CPU else dtype


def _cpu_has_bf16() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    # oneDNN takes bf16 on any AVX-512, but emulates it without instructions for it.
    emulated = torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and not emulated


EMULATED_BY_CPU = frozenset({torch.float16}) if _cpu_has_bf16() else HALVES
