"""Routing with fixed k in one kernel, in Triton; `moe_plugin.kernels.route` says what it means.

A program holds all experts of a few tokens, and takes the best of them K times: made for up to 512 experts and 16 of
them per token. Counts are sums of integers, so that the order in which programs add theirs does not matter.

Shape legend: T tokens, E experts, K experts selected per token, B tokens of a program, S experts, filled up to a power
of two.
"""

# Types are checked where Triton is not installed, too; and launches give a kernel's constexpr parameters their values.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_plugin.errors import ConfigError
from moe_plugin.kernels.route import Selected, check_top_k
from moe_plugin.routing.scores import Score, Sigmoid, SoftmaxAfterTopK, SoftmaxBeforeTopK

_SCORES = 1024
"""Scores that one program holds, at least. With twice as many, some sizes take 220 of the 255 registers of a thread."""


def route(
    logits_TE: Tensor, bias_E: Tensor, score: Score, top_k: int, valid_T: Tensor | None = None
) -> Selected:
    """As its twin, for scores that are sigmoid, softmax or the logits themselves.

    Raises:
        ConfigError: There are fewer than `top_k` experts, or the score is another one.
    """
    check_top_k(top_k, logits_TE)
    score_fn = _score_fn(score)
    num_tokens, num_experts = logits_TE.shape
    selected = Selected(
        torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits_TE.device),
        torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits_TE.device),
        torch.zeros(num_experts, dtype=torch.int64, device=logits_TE.device),
    )
    if num_tokens:
        slots = triton.next_power_of_2(num_experts)
        tokens = max(1, _SCORES // slots)
        select_experts[(triton.cdiv(num_tokens, tokens),)](
            logits_TE.detach().contiguous(),
            bias_E.contiguous(),
            None if valid_T is None else valid_T.contiguous(),
            *selected,
            num_tokens,
            num_experts,
            TOP_K=top_k,
            SCORE=score_fn,
            TOKENS=tokens,
            SLOTS=slots,
        )
    return selected


def _score_fn(score: Score) -> triton.JITFunction:
    known = {Sigmoid: tl.sigmoid, SoftmaxBeforeTopK: softmax, SoftmaxAfterTopK: unchanged}
    if type(score) not in known:
        names = ", ".join(each.__name__ for each in known)
        raise ConfigError(
            f"'score' must be one of {names} for the Triton kernel, got {score}. Use moe_plugin.kernels.route."
        )
    return known[type(score)]


@triton.jit
def softmax(logits_BS):
    """Over the experts."""
    powers_BS = tl.exp(logits_BS - tl.max(logits_BS, axis=1)[:, None])
    return powers_BS / tl.sum(powers_BS, axis=1)[:, None]


@triton.jit
def unchanged(logits_BS):
    """The logits."""
    return logits_BS


@triton.jit
def order(ranked_BS):
    """int32 that compare as fp32 do, NaN above all; zeros of either sign are equal."""
    bits_BS = tl.where(ranked_BS == 0.0, 0.0, ranked_BS).to(tl.int32, bitcast=True)
    order_BS = tl.where(bits_BS < 0, bits_BS ^ 0x7FFFFFFF, bits_BS)
    return tl.where(ranked_BS == ranked_BS, order_BS, 0x7FFFFFFF)


@triton.jit
def select_experts(
    logits_TE,
    bias_E,
    valid_T,
    expert_ids_TK,
    scores_TK,
    counts_E,
    num_tokens,
    num_experts,
    TOP_K: tl.constexpr,
    SCORE: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """One program per block of tokens."""
    tokens_B = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    experts_S = tl.arange(0, SLOTS)
    is_token_B, is_expert_S = tokens_B < num_tokens, experts_S < num_experts
    # Past the last token its row is read again, and what comes of it left out.
    places_BS = tl.minimum(tokens_B, num_tokens - 1)[:, None] * num_experts + experts_S[None, :]
    scores_BS = SCORE(tl.load(logits_TE + places_BS, mask=is_expert_S[None, :], other=float("-inf")))
    ranked_BS = scores_BS + tl.load(bias_E + experts_S, mask=is_expert_S, other=0.0)[None, :]
    # The lower half of a key makes it unique, and the larger the lower the id: one maximum gives order and expert.
    keys_BS = (order(ranked_BS).to(tl.int64) << 32) | (SLOTS - 1 - experts_S)[None, :]
    LEFT_OUT: tl.constexpr = -(2**63) + 1
    keys_BS = tl.where(is_expert_S[None, :], keys_BS, LEFT_OUT)
    taken_BS = tl.zeros((TOKENS, SLOTS), dtype=tl.int32)
    for k in range(TOP_K):
        ids_B = SLOTS - 1 - (tl.max(keys_BS, axis=1) & 0xFFFFFFFF)
        is_best_BS = experts_S[None, :] == ids_B[:, None]
        tl.store(expert_ids_TK + tokens_B * TOP_K + k, ids_B, mask=is_token_B)
        best_B = tl.sum(tl.where(is_best_BS, scores_BS, 0.0), axis=1)
        tl.store(scores_TK + tokens_B * TOP_K + k, best_B, mask=is_token_B)
        keys_BS = tl.where(is_best_BS, LEFT_OUT, keys_BS)
        taken_BS += is_best_BS.to(tl.int32)
    counted_B = is_token_B
    if valid_T is not None:
        counted_B = is_token_B & tl.load(valid_T + tokens_B, mask=is_token_B, other=0).to(tl.int1)
    counts_S = tl.sum(tl.where(counted_B[:, None], taken_BS, 0), axis=0)
    tl.atomic_add(counts_E + experts_S, counts_S.to(tl.int64), mask=is_expert_S & (counts_S > 0))
