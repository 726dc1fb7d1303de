"""Experts on a CPU: blocks of rows that stay in its caches, one product per expert and block.

A grouped product over all rows writes every intermediate to memory and reads it back; blocks do so only with what is
kept. Half precision is computed in fp32 on processors without instructions for it.

Shape legend: T tokens, D model width, H hidden width, E experts, K experts selected per token, P token-expert pairs,
N rows of a block, X one tensor per expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from moe_plugin.experts.kernels.dispatch import gate_weight_gradient, tokens_and_weights
from moe_plugin.experts.kernels.dtypes import HALVES, product_dtype

ROWS = 2048
"""Rows of a block, of one or more experts."""

Piece = tuple[int, int]
"""An expert and a number of its rows."""


def forward_in_blocks(
    x_TD: Tensor, weights_TK: Tensor, gate_up: Tensor, down: Tensor, pair_ids_P: Tensor, ends: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the experts' output (T, D), and gate and up projection of each pair (P, 2H), see `fused_experts`.

    `ends` is where the rows of each expert end.
    """
    dtype = product_dtype(x_TD.dtype, x_TD.device)
    y_TD = torch.zeros_like(x_TD, dtype=_sum_dtype(dtype))
    gate_up_P = x_TD.new_empty(len(pair_ids_P), gate_up.shape[-1])
    pair_ids_P = pair_ids_P.long()  # index_add_ is faster with int64.
    token_ids_P, weights_P1 = tokens_and_weights(pair_ids_P, weights_TK.to(dtype))
    gate_up_X, down_X = gate_up.unbind(0), down.unbind(0)
    with torch.autocast(x_TD.device.type, enabled=False):
        for rows, pieces in blocks(ends, dtype):
            x_ND = x_TD.index_select(0, token_ids_P[rows]).to(dtype)
            gate_up_N = gate_up_P[rows] if dtype == x_TD.dtype else None
            gate_up_N = _multiply(pieces, x_ND, gate_up_X, gate_up_N)
            if dtype != x_TD.dtype:
                gate_up_P[rows] = gate_up_N
            gate_NH, up_NH = gate_up_N.chunk(2, dim=-1)
            hidden_NH = functional.silu(gate_NH).mul_(up_NH).mul_(weights_P1[rows])
            y_TD.index_add_(0, token_ids_P[rows], _multiply(pieces, hidden_NH, down_X).to(y_TD.dtype))
    return y_TD.to(x_TD.dtype), gate_up_P


def backward_in_blocks(
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
    """Return the gradients of `forward_in_blocks`, see `fused_experts`; an empty tensor for each not wanted."""
    dtype = product_dtype(x_TD.dtype, x_TD.device)
    dx_TD = torch.zeros_like(x_TD, dtype=_sum_dtype(dtype)) if wanted[0] else x_TD.new_empty(0)
    dgate_up = torch.empty_like(gate_up, dtype=dtype) if wanted[2] else x_TD.new_empty(0)
    ddown = torch.empty_like(down, dtype=dtype) if wanted[3] else x_TD.new_empty(0)
    begun: set[int] = set()
    pair_ids_P = pair_ids_P.long()  # index_add_ is faster with int64.
    token_ids_P, weights_P1 = tokens_and_weights(pair_ids_P, weights_TK.to(dtype))
    dweights_P = torch.empty_like(weights_P1[:, 0])
    gate_up_X, down_X = gate_up.mT.unbind(0), down.mT.unbind(0)
    dgate_up_X, ddown_X = dgate_up.unbind(0), ddown.unbind(0)
    with torch.autocast(x_TD.device.type, enabled=False):
        for rows, pieces in blocks(ends, dtype):
            dy_ND = gradient_TD.index_select(0, token_ids_P[rows]).to(dtype)
            hidden_NH, dgate_up_N = through_swiglu_(
                gate_up_P[rows].to(dtype),
                _multiply(pieces, dy_ND, down_X),
                weights_P1[rows],
                dweights_P[rows],
            )
            if wanted[3]:
                _add_products_(ddown_X, pieces, hidden_NH, dy_ND, begun)
            del hidden_NH, dy_ND  # Here and below, or they would still be held while others are made.
            if wanted[2]:
                x_ND = x_TD.index_select(0, token_ids_P[rows]).to(dtype)
                _add_products_(dgate_up_X, pieces, x_ND, dgate_up_N, begun)
                del x_ND
            begun.update(expert for expert, _ in pieces)
            if wanted[0]:
                dx_ND = _multiply(pieces, dgate_up_N, gate_up_X).to(dx_TD.dtype)
                dx_TD.index_add_(0, token_ids_P[rows], dx_ND)
                del dx_ND
            del dgate_up_N
    for expert in set(range(len(ends))) - begun:
        for gradients_X in (dgate_up_X, ddown_X):
            if gradients_X:  # wanted
                gradients_X[expert].zero_()
    dweights_TK = gate_weight_gradient(dweights_P, pair_ids_P, weights_TK) if wanted[1] else x_TD.new_empty(0)
    return dx_TD.to(x_TD.dtype), dweights_TK, dgate_up.to(gate_up.dtype), ddown.to(down.dtype)


def blocks(ends: Sequence[int], dtype: torch.dtype) -> Iterator[tuple[slice, list[Piece]]]:
    """Cut rows sorted by expert into blocks; an expert may be in several.

    In half precision a block holds whole experts, however large: a sum over pieces would lose digits.

    Args:
        ends: Where the rows of each expert end.
        dtype: Of the products.
    """
    splits = dtype not in HALVES
    start, position, pieces = 0, 0, []
    for expert, end in enumerate(ends):
        while position < end:
            size = min(end - position, ROWS) if splits else end - position
            if pieces and position + size - start > ROWS:
                yield slice(start, position), pieces
                start, pieces = position, []
            pieces.append((expert, size))
            position += size
    if pieces:
        yield slice(start, position), pieces


def _multiply(
    pieces: list[Piece], rows_NI: Tensor, weights_X: tuple[Tensor, ...], out_NO: Tensor | None = None
) -> Tensor:
    """Multiply the rows of each piece by the weights (I, O) of its expert: (N, O), a new tensor if none is given."""
    out_NO = rows_NI.new_empty(len(rows_NI), weights_X[0].shape[1]) if out_NO is None else out_NO
    sizes = [size for _, size in pieces]
    for (expert, _), rows, out in zip(pieces, rows_NI.split(sizes), out_NO.split(sizes), strict=True):
        torch.mm(rows, weights_X[expert].to(rows.dtype), out=out)
    return out_NO


def _add_products_(
    sums_X: tuple[Tensor, ...], pieces: list[Piece], rows_NI: Tensor, gradients_NO: Tensor, begun: set[int]
) -> None:
    """Add the gradient of each expert's weights (I, O), or set it for experts not yet begun."""
    sizes = [size for _, size in pieces]
    for (expert, _), rows, gradient in zip(
        pieces, rows_NI.split(sizes), gradients_NO.split(sizes), strict=True
    ):
        if expert in begun:
            sums_X[expert].addmm_(rows.t(), gradient)
        else:
            torch.mm(rows.t(), gradient, out=sums_X[expert])


def through_swiglu_(
    gate_up_N: Tensor, dhidden_NH: Tensor, weights_N1: Tensor, dweights_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the weighted hidden activations, and the gradient before the activation; fill in the gate weights'.

    Args:
        gate_up_N: Gate and up projection, (N, 2H).
        dhidden_NH: Gradient of the weighted hidden activations; changed in place.
        weights_N1: Gate weights.
        dweights_N: Receives their gradient.
    """
    gate_NH, up_NH = gate_up_N.chunk(2, dim=-1)
    active_NH = functional.silu(gate_NH)
    hidden_NH = active_NH * up_NH
    dgate_up_N = torch.empty_like(gate_up_N)
    dgate_NH, dup_NH = dgate_up_N.chunk(2, dim=-1)
    torch.sum(torch.mul(hidden_NH, dhidden_NH, out=dup_NH), -1, out=dweights_N)
    hidden_NH.mul_(weights_N1)
    dhidden_NH.mul_(weights_N1)
    torch.mul(dhidden_NH, active_NH, out=dup_NH)
    torch.ops.aten.silu_backward.grad_input(dhidden_NH.mul_(up_NH), gate_NH, grad_input=dgate_NH)
    return hidden_NH, dgate_up_N


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a token's experts are added up: never half precision."""
    return torch.float32 if dtype in HALVES else dtype
