"""Rows of tokens to rows of token-expert pairs and back, in Triton: the functions of `permute`.

Sums are taken in fp32, in the order of a token's experts.

Shape legend: T tokens, K experts selected per token, N = T * K pairs, P pairs that are used, D width, B block.
"""

# Types are checked without Triton too, and launches give a kernel's constexpr parameters their values.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 1024
"""Columns of a row that one program takes, at most."""
_PAIRS = 1024
"""Pairs that one program places."""


def permute(x_TD: Tensor, token_ids_P: Tensor) -> Tensor:
    """Return what its twin does, see `moe_plugin.experts.kernels.permute`."""
    num_pairs, dim = len(token_ids_P), x_TD.shape[1]
    out_PD = x_TD.new_empty(num_pairs, dim)
    if out_PD.numel():
        columns = min(_COLUMNS, triton.next_power_of_2(dim))
        grid = num_pairs, triton.cdiv(dim, columns)
        gather_rows[grid](x_TD.contiguous(), token_ids_P.contiguous(), out_PD, dim, COLUMNS=columns)
    return out_PD


def unpermute(
    y_PD: Tensor, pair_ids_P: Tensor, num_tokens: int, top_k: int, weights_TK: Tensor | None = None
) -> Tensor:
    """Return what its twin does, see `moe_plugin.experts.kernels.permute`."""
    dim = y_PD.shape[1]
    out_TD = y_PD.new_empty(num_tokens, dim)
    if out_TD.numel():
        columns = min(_COLUMNS, triton.next_power_of_2(dim))
        grid = num_tokens, triton.cdiv(dim, columns)
        weights_TK = None if weights_TK is None else weights_TK.contiguous()
        rows_N = _rows(pair_ids_P, num_tokens * top_k)
        sum_rows[grid](y_PD.contiguous(), rows_N, weights_TK, out_TD, dim, TOP_K=top_k, COLUMNS=columns)
    return out_TD


def _rows(pair_ids_P: Tensor, num_pairs: int) -> Tensor:
    """Return the row of each of the N pairs, -1 if it is unused; int32."""
    rows_N = pair_ids_P.new_full((num_pairs,), -1, dtype=torch.int32)
    if used := len(pair_ids_P):
        place_rows[(triton.cdiv(used, _PAIRS),)](pair_ids_P.contiguous(), rows_N, used, PAIRS=_PAIRS)
    return rows_N


@triton.jit
def gather_rows(x_TD, token_ids_P, out_PD, dim, COLUMNS: tl.constexpr):
    """Copy the rows of tokens, see `permute`: a program per row and block of columns."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ids_P + row).to(tl.int64)
    columns_B = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside_B = columns_B < dim
    x_B = tl.load(x_TD + token * dim + columns_B, mask=inside_B)
    tl.store(out_PD + row * dim + columns_B, x_B, mask=inside_B)


@triton.jit
def place_rows(pair_ids_P, rows_N, used, PAIRS: tl.constexpr):
    """Note the row of each used pair, see `_rows`."""
    rows_B = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    inside_B = rows_B < used
    pairs_B = tl.load(pair_ids_P + rows_B, mask=inside_B)
    tl.store(rows_N + pairs_B, rows_B, mask=inside_B)


@triton.jit
def sum_rows(y_PD, rows_TK, weights_TK, out_TD, dim, TOP_K: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum the rows of each token, see `unpermute`: a program per token and block of columns."""
    token = tl.program_id(0).to(tl.int64)
    columns_B = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside_B = columns_B < dim
    sum_B = tl.zeros((COLUMNS,), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(rows_TK + token * TOP_K + k).to(tl.int64)
        y_B = tl.load(y_PD + row * dim + columns_B, mask=inside_B & (row >= 0), other=0.0).to(tl.float32)
        if weights_TK is not None:
            weight = tl.load(weights_TK + token * TOP_K + k, mask=row >= 0, other=0.0)
            y_B *= weight.to(tl.float32)
        sum_B += y_B
    tl.store(out_TD + token * dim + columns_B, sum_B.to(out_TD.dtype.element_ty), mask=inside_B)
