"""Routed SwiGLU experts as one operation: forward and backward by hand, one implementation per device.

CPUs with native bf16 use a separate implementation. With operators of ``torch.library``, `torch.compile` takes a whole
model in any dtype and does not compile again when loads change.

Shape legend: T tokens, D model width, H hidden width, E experts, K experts selected per token, P token-expert pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe_plugin.experts.kernels.batched_products import backward_in_batches, forward_in_batches
from moe_plugin.experts.kernels.dispatch import order_pairs
from moe_plugin.experts.kernels.dtypes import HALVES, product_dtype
from moe_plugin.experts.kernels.grouped_products import backward_by_groups, forward_by_groups
from moe_plugin.experts.kernels.row_blocks import backward_in_blocks, forward_in_blocks
from moe_plugin.types import Routing

_LIBRARY = torch.library.Library("moe_plugin", "FRAGMENT")
_INPUTS = "Tensor x_TD, Tensor weights_TK, Tensor gate_up, Tensor down, Tensor pair_ids_P, Tensor offsets_E"
_LIBRARY.define(f"experts({_INPUTS}) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"experts_backward(Tensor gradient_TD, {_INPUTS}, Tensor gate_up_P, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)


def fused_experts(x_TD: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    """Return ``y_t = sum_k weight_tk * (silu(x_t G) * (x_t U)) W`` with G, U and W those of expert k of token t.

    The backward keeps the input, the gate weights, the order of the pairs, and gate and up projection before the
    activation: 2H numbers per pair. The rest is computed again. Gradients cannot be differentiated, and unwanted ones,
    such as those of frozen weights, are not computed.

    Args:
        x_TD: Hidden states.
        routing: Gate weights, expert ids, and which of them are used. With all used nothing waits for the device, if
            torch has a kernel for `grouped_mm`, see `moe_plugin.experts.kernels.grouped_products`.
        gate_up: (E, D, 2H), gate first; any dtype.
        down: (E, H, D).

    Returns:
        (T, D), in the dtype of `x_TD`.
    """
    # Weights that need no cast for the products are neither copied nor rounded. Batches cast those of their experts,
    # so no copy of all of them is kept for the backward.
    if not _makes_kernels(x_TD):
        wide = product_dtype(x_TD.dtype, x_TD.device)
        gate_up, down = (w if w.dtype == wide else w.to(x_TD.dtype) for w in (gate_up, down))
    pair_ids_P, offsets_E = order_pairs(routing.expert_ids_TK, len(gate_up), routing.used_TK)
    weights_TK = routing.weights_TK.to(x_TD.dtype)
    return _Experts.apply(x_TD, weights_TK, gate_up, down, pair_ids_P.int(), offsets_E)


run_forward = torch.ops.moe_plugin.experts
run_backward = torch.ops.moe_plugin.experts_backward


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        y_TD, gate_up_P = run_forward(*inputs)
        ctx.save_for_backward(*inputs, gate_up_P)
        return y_TD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        wanted = ctx.needs_input_grad[:4]
        found = run_backward(gradients[0].contiguous(), *ctx.saved_tensors, wanted)
        asked = (gradient if is_wanted else None for gradient, is_wanted in zip(found, wanted, strict=True))
        return (*asked, None, None)


def _fake_forward(
    x_TD: Tensor, weights_TK: Tensor, gate_up: Tensor, down: Tensor, pair_ids_P: Tensor, _: Tensor
) -> Any:
    return torch.empty_like(x_TD), x_TD.new_empty(pair_ids_P.shape[0], gate_up.shape[-1])


def _fake_backward(_: Tensor, *inputs: Any) -> Any:
    *tensors, wanted = inputs
    return tuple(
        torch.empty_like(tensor) if is_wanted else tensor.new_empty(0)  # weights may be transposed views
        for tensor, is_wanted in zip(tensors[:4], wanted, strict=True)
    )


def _forward_on_cpu(*inputs: Any) -> tuple[Tensor, Tensor]:
    *given, offsets_E = inputs
    run = forward_in_batches if _makes_kernels(given[0]) else forward_in_blocks
    return run(*given, ends=offsets_E.tolist())


def _backward_on_cpu(*inputs: Any) -> Sequence[Tensor]:
    *given, offsets_E, gate_up_P, wanted = inputs
    run = backward_in_batches if _makes_kernels(given[0]) else backward_in_blocks
    return run(*given, ends=offsets_E.tolist(), gate_up_P=gate_up_P, wanted=wanted)


def _makes_kernels(x_TD: Tensor) -> bool:
    """Return whether products are oneDNN's, which makes a kernel for each number of rows."""
    return x_TD.device.type == "cpu" and product_dtype(x_TD.dtype, x_TD.device) in HALVES


_LIBRARY.impl("experts", _forward_on_cpu, "CompositeExplicitAutograd")
_LIBRARY.impl("experts_backward", _backward_on_cpu, "CompositeExplicitAutograd")
_LIBRARY.impl("experts", forward_by_groups, "CUDA")
_LIBRARY.impl("experts_backward", backward_by_groups, "CUDA")
torch.library.register_fake("moe_plugin::experts", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("moe_plugin::experts_backward", _fake_backward, lib=_LIBRARY)


@register_flop_formula(torch.ops.moe_plugin.experts)
def _forward_flops(x: Any, weights: Any, gate_up: Any, down: Any, pair_ids: Any, *_: Any, **__: Any) -> int:
    """Return operations for `torch.utils.flop_counter`, which gives the shapes."""
    return 2 * pair_ids[0] * (gate_up[1] * gate_up[2] + down[1] * down[2])


@register_flop_formula(torch.ops.moe_plugin.experts_backward)
def _backward_flops(gradient: Any, *inputs: Any, **_: Any) -> int:
    _, _, gate_up, down, pair_ids, *_rest, wanted = inputs
    of_gate_up, of_down = gate_up[1] * gate_up[2], down[1] * down[2]
    return 2 * pair_ids[0] * (of_gate_up * (wanted[0] + wanted[2]) + of_down * (1 + wanted[3]))
