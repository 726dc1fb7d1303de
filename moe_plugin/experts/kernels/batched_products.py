"""Experts on a CPU with instructions for bf16: batches of experts, one batched product per projection.

There each product costs 30 to 50 microseconds on top of its arithmetic, and nearly a millisecond more for each new
number of rows, as oneDNN makes a kernel for it. Loads change in every step. So experts are multiplied together, their
rows padded to one of few numbers.

A row of padding repeats a row of its expert, with a gate weight of zero in the backward. The forward does not read its
output.

Shape legend: T tokens, D model width, H hidden width, E experts, K experts selected per token, P token-expert pairs,
N rows with padding, B experts of a batch, M rows of each, I inputs of a projection, O its outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from moe_plugin.experts.kernels.dispatch import gate_weight_gradient, tokens_and_weights
from moe_plugin.experts.kernels.permute import sum_rows
from moe_plugin.experts.kernels.row_batches import Batch, lay_out
from moe_plugin.experts.kernels.row_blocks import through_swiglu_


def forward_in_batches(
    x_TD: Tensor, weights_TK: Tensor, gate_up: Tensor, down: Tensor, pair_ids_P: Tensor, ends: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the experts' output (T, D), and gate and up projection of each pair (P, 2H) in the order of their batches.

    `ends` is where the pairs of each expert end. For the others see `fused_experts`.
    """
    layout, (num_tokens, top_k) = lay_out(pair_ids_P, ends), weights_TK.shape
    token_ids_N = (layout.pair_ids_P // top_k).index_select(0, layout.sources_N)
    y_ND = x_TD.new_empty(len(token_ids_N), x_TD.shape[1])
    gate_up_P = x_TD.new_empty(len(pair_ids_P), gate_up.shape[2])
    with torch.autocast(x_TD.device.type, enabled=False):
        for batch in layout.batches:
            rows, pairs = batch.rows, batch.pairs
            x_BMD = _by_expert(x_TD.index_select(0, token_ids_N[rows]), batch)
            gate_up_BMO = torch.bmm(x_BMD, _of(batch, gate_up, x_TD.dtype))
            rows_P = layout.rows_P[pairs] - rows.start
            torch.index_select(gate_up_BMO.flatten(0, 1), 0, rows_P, out=gate_up_P[pairs])
            gate_BMH, up_BMH = gate_up_BMO.chunk(2, dim=-1)
            hidden_BMH = functional.silu(gate_BMH).mul_(up_BMH)
            torch.bmm(hidden_BMH, _of(batch, down, x_TD.dtype), out=_by_expert(y_ND[rows], batch))
    return sum_rows(y_ND, layout.rows_P, layout.pair_ids_P, num_tokens, top_k, weights_TK), gate_up_P


def backward_in_batches(
    gradient_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    gate_up: Tensor,
    down: Tensor,
    pair_ids_P: Tensor,
    ends: Sequence[int],
    gate_up_P: Tensor,
    wanted: Sequence[bool] = (True, True, True, True),
) -> Sequence[Tensor]:
    """Return the gradients of `forward_in_batches`, see `fused_experts`; an empty tensor for each not wanted."""
    layout, nothing, (num_tokens, top_k) = lay_out(pair_ids_P, ends), x_TD.new_empty(0), weights_TK.shape
    token_ids_P, weights_P1 = tokens_and_weights(layout.pair_ids_P, weights_TK)
    token_ids_N = token_ids_P.index_select(0, layout.sources_N)
    # Weights of padding are zero, and with them its share in every gradient.
    weights_N1 = weights_P1.new_zeros(len(token_ids_N), 1).index_copy_(0, layout.rows_P, weights_P1)
    dweights_N = torch.empty_like(weights_N1[:, 0])
    dx_ND = x_TD.new_empty(len(token_ids_N), x_TD.shape[1]) if wanted[0] else nothing
    dgate_up, ddown = (
        torch.empty_like(weights) if is_wanted else nothing
        for weights, is_wanted in zip((gate_up, down), wanted[2:], strict=True)
    )
    with torch.autocast(x_TD.device.type, enabled=False):
        for batch in layout.batches:
            rows = batch.rows
            dy_ND = gradient_TD.index_select(0, token_ids_N[rows])
            dhidden_BMH = torch.bmm(_by_expert(dy_ND, batch), _of(batch, down, x_TD.dtype).mT)
            gate_up_N = gate_up_P.index_select(0, layout.sources_N[rows])
            hidden_NH, dgate_up_N = through_swiglu_(
                gate_up_N, dhidden_BMH.flatten(0, 1), weights_N1[rows], dweights_N[rows]
            )
            del dhidden_BMH, gate_up_N
            if wanted[3]:
                _set_gradients(ddown, batch, hidden_NH, dy_ND)
            del hidden_NH, dy_ND
            if wanted[2]:
                _set_gradients(dgate_up, batch, x_TD.index_select(0, token_ids_N[rows]), dgate_up_N)
            if wanted[0]:
                dx_BMD = _by_expert(dx_ND[rows], batch)
                torch.bmm(_by_expert(dgate_up_N, batch), _of(batch, gate_up, x_TD.dtype).mT, out=dx_BMD)
            del dgate_up_N
    for expert in set(range(len(ends))).difference(*(batch.experts for batch in layout.batches)):
        for gradients in (dgate_up, ddown):
            if len(gradients):  # wanted
                gradients[expert].zero_()
    dweights_P = dweights_N.index_select(0, layout.rows_P)
    return (
        sum_rows(dx_ND, layout.rows_P, layout.pair_ids_P, num_tokens, top_k) if wanted[0] else nothing,
        gate_weight_gradient(dweights_P, layout.pair_ids_P, weights_TK) if wanted[1] else nothing,
        dgate_up,
        ddown,
    )


def _by_expert(rows_NI: Tensor, batch: Batch) -> Tensor:
    return rows_NI.view(len(batch.experts), batch.height, -1)


def _of(batch: Batch, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weights of a batch's experts in this dtype, (B, I, O): a copy, unless it is a single expert."""
    if len(batch.experts) == 1:
        return weights.narrow(0, batch.experts[0], 1).to(dtype)
    experts = torch.tensor(batch.experts)
    if _is_transposed(weights):
        return weights.mT.index_select(0, experts).to(dtype).mT
    return weights.index_select(0, experts).to(dtype)


def _set_gradients(gradients: Tensor, batch: Batch, inputs_NI: Tensor, gradients_NO: Tensor) -> None:
    """Set the gradients of a batch's experts among those of all, which have the weights' layout in memory."""
    if _is_transposed(gradients):
        gradients, inputs_NI, gradients_NO = gradients.mT, gradients_NO, inputs_NI
    product_BIO = torch.bmm(_by_expert(inputs_NI, batch).mT, _by_expert(gradients_NO, batch))
    # Much faster than `index_copy_`.
    torch._foreach_copy_([gradients[expert] for expert in batch.experts], product_BIO.unbind(0))  # pyright: ignore[reportPrivateImportUsage]


def _is_transposed(weights: Tensor) -> bool:
    """Return whether they are a view of a host's, (E, O, I) in memory."""
    return weights.mT.is_contiguous() and not weights.is_contiguous()
