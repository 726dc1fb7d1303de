"""Stand-ins for kernels that fake tensors run in another way, or not at all.

Shape legend: B batch, N heads, S sequence, A head width, P rows, I input width, O output width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moe_plugin.experts import fused
from moe_plugin.experts.kernels import dtypes
from moe_plugin.experts.kernels.row_blocks import backward_in_blocks, forward_in_blocks


@contextmanager
def fused_kernels() -> Iterator[None]:
    """Make attention one kernel that never holds the scores, and products use the dtype asked for.

    Functions are replaced: a `TorchFunctionMode` would be inactive while a backward recomputes.
    """
    before = {place: getattr(*place) for place in _STAND_INS}
    _set(_STAND_INS)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[tuple[Any, str], Any]) -> None:
    for (module, name), value in values.items():
        setattr(module, name, value)


class _FlashAttention(torch.autograd.Function):
    """The memory of flash attention: kept are its inputs, the output and one number per row (arXiv 2307.08691)."""

    @staticmethod
    def forward(ctx: Any, q_BNSA: Tensor, k_BNSA: Tensor, v_BNSA: Tensor) -> Tensor:
        batch, heads, length, _ = q_BNSA.shape
        # Heads next to their widths, as the kernels do, so joining the heads copies nothing.
        y_BNSA = q_BNSA.new_empty(batch, length, heads, v_BNSA.shape[-1]).transpose(1, 2)
        row_sums_BNS = q_BNSA.new_empty((batch, heads, length), dtype=torch.float32)
        ctx.save_for_backward(q_BNSA, k_BNSA, v_BNSA, y_BNSA, row_sums_BNS)
        return y_BNSA

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attention(q_BNSA: Tensor, k_BNSA: Tensor, v_BNSA: Tensor, *_: Any, **__: Any) -> Tensor:
    dtype = q_BNSA.dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    return _FlashAttention.apply(q_BNSA.to(dtype), k_BNSA.to(dtype), v_BNSA.to(dtype))  # pyright: ignore[reportReturnType]


class _GroupedProduct(torch.autograd.Function):
    """The memory of `grouped_mm`: rows and weights are kept, and each gradient is made once."""

    @staticmethod
    def forward(ctx: Any, rows_PI: Tensor, weights_EIO: Tensor) -> Tensor:
        ctx.save_for_backward(rows_PI, weights_EIO)
        return rows_PI.new_empty(rows_PI.shape[0], weights_EIO.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors)


def _experts(*inputs: Any) -> tuple[Tensor, Tensor]:
    *given, offsets_E = inputs
    return forward_in_blocks(*given, ends=_even_ends(given[4], offsets_E))


def _experts_backward(*inputs: Any) -> Sequence[Tensor]:
    *given, offsets_E, gate_up_P, _ = inputs  # a plan is of training, which wants every gradient
    return backward_in_blocks(*given, ends=_even_ends(given[5], offsets_E), gate_up_P=gate_up_P)


def _even_ends(pair_ids_P: Tensor, offsets_E: Tensor) -> list[int]:
    """Return the ends of equal parts: fake tensors have no loads."""
    num_pairs, num_experts = len(pair_ids_P), len(offsets_E)
    return [num_pairs * (expert + 1) // num_experts for expert in range(num_experts)]


def _grouped_mm(rows_PI: Tensor, weights_EIO: Tensor, *_: Any, **__: Any) -> Tensor:
    return _GroupedProduct.apply(rows_PI, weights_EIO)  # pyright: ignore[reportReturnType]


_STAND_INS: dict[tuple[Any, str], Any] = {
    # This machine may emulate half precision; the planned one does not.
    (dtypes, "EMULATED_BY_CPU"): frozenset(),
    (fused, "run_forward"): _experts,
    (fused, "run_backward"): _experts_backward,
    (functional, "scaled_dot_product_attention"): _attention,
    (functional, "grouped_mm"): _grouped_mm,
    (torch, "_grouped_mm"): _grouped_mm,
}
