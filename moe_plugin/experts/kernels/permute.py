"""Rows of tokens to rows of token-expert pairs and back, in pure torch.

Each is the other's backward: the gradient of `permute` is `unpermute` without gate weights.

Shape legend: T tokens, K experts selected per token, N = T * K pairs, P pairs that are used, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def permute(x_TD: Tensor, token_ids_P: Tensor) -> Tensor:
    """Return the row of each pair's token: (P, D).

    Args:
        x_TD: Rows of tokens, any dtype.
        token_ids_P: The token of each used pair, in any order; int32 or int64.
    """
    return x_TD.index_select(0, token_ids_P)


def unpermute(
    y_PD: Tensor, pair_ids_P: Tensor, num_tokens: int, top_k: int, weights_TK: Tensor | None = None
) -> Tensor:
    """Sum the rows of each token's pairs: (T, D). It gives the same bits each time, unlike `index_add` on a GPU.

    Args:
        y_PD: Rows of pairs; fp32, bf16 or fp16.
        pair_ids_P: Used pairs in any order, ``t * top_k + k`` for expert k of token t, each once; int32 or int64.
        num_tokens: Tokens T. Those without a used pair get zeros.
        top_k: Experts selected per token.
        weights_TK: Factor of each pair's row, in the dtype of `y_PD`; None for one.
    """
    rows_P = torch.arange(len(pair_ids_P), device=pair_ids_P.device)
    return sum_rows(y_PD, rows_P, pair_ids_P, num_tokens, top_k, weights_TK)


def sum_rows(
    y_RD: Tensor,
    rows_P: Tensor,
    pair_ids_P: Tensor,
    num_tokens: int,
    top_k: int,
    weights_TK: Tensor | None = None,
) -> Tensor:
    """Sum rows as `unpermute` does, with the row of each pair given by `rows_P`, int64."""
    if not len(pair_ids_P):
        return y_RD.new_zeros(num_tokens, y_RD.shape[1])
    pairs_P = pair_ids_P.long()
    rows_N = pairs_P.new_zeros(num_tokens * top_k).scatter_(0, pairs_P, rows_P)
    shares_N = y_RD.new_zeros(num_tokens * top_k)
    if weights_TK is None:
        shares_N.index_fill_(0, pairs_P, 1.0)
    else:
        shares_N.index_copy_(0, pairs_P, weights_TK.reshape(-1).index_select(0, pairs_P))
    return functional.embedding_bag(
        rows_N.view(-1, top_k), y_RD, mode="sum", per_sample_weights=shares_N.view(-1, top_k)
    )
