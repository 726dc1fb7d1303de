"""Experts on a GPU: one grouped product per projection over all rows.

Nothing here waits for the device, but `grouped_mm` itself does if torch has no kernel for it: torch 2.13 has one for
bf16 on compute capability 9 and 10, and otherwise loops over the experts by offsets that the host reads.

Shape legend: T tokens, D model width, H hidden width, E experts, K experts selected per token, P token-expert pairs,
I inputs of a projection, O its outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from moe_plugin.experts.kernels.choice import kernels_for
from moe_plugin.experts.kernels.dispatch import gate_weight_gradient, tokens_and_weights
from moe_plugin.experts.kernels.row_blocks import backward_in_blocks, forward_in_blocks, through_swiglu_

_ALIGNMENT_BYTES = 16  # What grouped_mm asks of every stride.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def forward_by_groups(
    x_TD: Tensor, weights_TK: Tensor, gate_up: Tensor, down: Tensor, pair_ids_P: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the experts' output (T, D), and gate and up projection of each pair (P, 2H), see `fused_experts`."""
    if not _can_group(gate_up, down):
        return forward_in_blocks(x_TD, weights_TK, gate_up, down, pair_ids_P, offsets_E.tolist())
    kernels = kernels_for(x_TD.device)
    token_ids_P, weights_P1 = tokens_and_weights(pair_ids_P, weights_TK)
    x_PD = kernels.permute(x_TD, token_ids_P)
    gate_up_P = functional.grouped_mm(x_PD, gate_up, offs=offsets_E)
    gate_PH, up_PH = gate_up_P.chunk(2, dim=-1)
    hidden_PH = functional.silu(gate_PH).mul_(up_PH).mul_(weights_P1)
    y_PD = functional.grouped_mm(hidden_PH, down, offs=offsets_E)
    return kernels.unpermute(y_PD, pair_ids_P, *weights_TK.shape), gate_up_P


def backward_by_groups(
    gradient_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    gate_up: Tensor,
    down: Tensor,
    pair_ids_P: Tensor,
    offsets_E: Tensor,
    gate_up_P: Tensor,
    wanted: Sequence[bool] = (True, True, True, True),
) -> Sequence[Tensor]:
    """Return the gradients of `forward_by_groups`, see `fused_experts`; an empty tensor for each not wanted."""
    if not _can_group(gate_up, down):
        given = gradient_TD, x_TD, weights_TK, gate_up, down, pair_ids_P
        return backward_in_blocks(*given, offsets_E.tolist(), gate_up_P, wanted)
    gradients: list[Tensor | None] = [None] * len(wanted)
    kernels = kernels_for(x_TD.device)
    token_ids_P, weights_P1 = tokens_and_weights(pair_ids_P, weights_TK)
    dy_PD = kernels.permute(gradient_TD, token_ids_P)
    dhidden_PH = functional.grouped_mm(dy_PD, down.mT, offs=offsets_E)
    dweights_P = torch.empty_like(weights_P1[:, 0])
    hidden_PH, dgate_up_P = through_swiglu_(gate_up_P, dhidden_PH, weights_P1, dweights_P)
    del dhidden_PH
    if wanted[1]:
        gradients[1] = gate_weight_gradient(dweights_P, pair_ids_P, weights_TK)
    if wanted[3]:
        gradients[3] = _weight_gradient(hidden_PH, dy_PD, down, offsets_E)
    del hidden_PH, dy_PD
    if wanted[0]:
        dx_PD = functional.grouped_mm(dgate_up_P, gate_up.mT, offs=offsets_E)
        gradients[0] = kernels.unpermute(dx_PD, pair_ids_P, *weights_TK.shape)
        del dx_PD
    if wanted[2]:
        gradients[2] = _weight_gradient(kernels.permute(x_TD, token_ids_P), dgate_up_P, gate_up, offsets_E)
    return [x_TD.new_empty(0) if gradient is None else gradient for gradient in gradients]


def _weight_gradient(inputs_PI: Tensor, gradients_PO: Tensor, weights: Tensor, offsets_E: Tensor) -> Tensor:
    """Return the gradient of weights (E, I, O) in their layout in memory: autograd would copy any other."""
    if weights.is_contiguous():
        return functional.grouped_mm(inputs_PI.t(), gradients_PO, offs=offsets_E)
    return functional.grouped_mm(gradients_PO.t(), inputs_PI, offs=offsets_E).mT


def _can_group(gate_up: Tensor, down: Tensor) -> bool:
    """Return whether grouped_mm takes the dtype and the memory layout of weights, inputs, outputs and gradients."""
    widths = (*gate_up.shape[1:], down.shape[1])
    aligned = all(width * gate_up.element_size() % _ALIGNMENT_BYTES == 0 for width in widths)
    return aligned and gate_up.dtype in _DTYPES and _has_rows(gate_up) and _has_rows(down)


def _has_rows(weights: Tensor) -> bool:
    """Return whether rows or columns are contiguous, and all of them begin at aligned addresses."""
    unit, *others = sorted(weights.stride())
    return unit == 1 and all(stride * weights.element_size() % _ALIGNMENT_BYTES == 0 for stride in others)
