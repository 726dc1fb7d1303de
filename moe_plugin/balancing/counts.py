"""Exact counting of the tokens each expert received.

Shape legend: T tokens, K experts selected per token, E experts.

A tally is one int64 tensor per routing site, so that all a step must share between ranks travels in a single
exact, order-independent sum:

    [0, E)  tokens per expert
    E       more than zero if the step must not count, as when a selected score was NaN or infinite
    E + 1   selections seen under a mask, padding included
    E + 2   tokens, counted only where they may use different numbers of experts
    E + 3   sum over tokens of the score spread, in units of 1 / SPREAD_UNIT

Whether a selected score was NaN or infinite is noted in a float, the poison, which costs two operations a call instead
of six; it joins the tally when that is taken.

Counting is a ``torch.library`` operator that changes the tally, so that it survives ``torch.compile`` with
``fullgraph`` and decides when it *runs*, not when it is traced, whether this is a real forward.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from moe_plugin.balancing.recompute import is_training_forward

EXTRA_SLOTS = 4
SPREAD_UNIT = 2**24

_LIBRARY = torch.library.Library("moe_plugin", "DEF")
_LIBRARY.define(
    "count_(Tensor(a!) tally, Tensor(b!)? poison, Tensor expert_ids_TK, Tensor selected_TK, Tensor? scores_TE,"
    " Tensor? valid_T, Tensor? used_TK, bool training, bool grad_enabled) -> ()"
)


def new_tally(num_experts: int) -> Tensor:
    """An empty tally: int64 zeros of ``num_experts + EXTRA_SLOTS``."""
    return torch.zeros(num_experts + EXTRA_SLOTS, dtype=torch.int64)


def new_poison() -> Tensor:
    """A float that is 0 until a selected score was NaN or infinite, and NaN from then on; fp32 scalar."""
    return torch.zeros((), dtype=torch.float32)


def count_(
    tally: Tensor,
    expert_ids_TK: Tensor,
    selected_TK: Tensor,
    *,
    poison: Tensor | None = None,
    scores_TE: Tensor | None = None,
    valid_T: Tensor | None = None,
    used_TK: Tensor | None = None,
    training: bool,
) -> None:
    """Add one forward pass to ``tally``, in place.

    With ``training`` nothing is added during recomputation, under ``no_grad`` or in backward. Integer scatter
    addition is exact in any order and needs no host synchronisation.

    Args:
        tally: From `new_tally`, on the device of the ids; changed in place.
        expert_ids_TK: Selected experts, int64, any leading shape.
        selected_TK: The scores of the selected experts; only their being finite is looked at.
        poison: From `new_poison`, on the same device; changed in place. None to not look at the scores.
        scores_TE: Unbiased scores of all experts, to measure their spread; None to leave it out.
        valid_T: bool, True for tokens that count, one entry per token; None when all do.
        used_TK: bool, True for selections that count, where tokens may use fewer than K experts; None when all do.
        training: Count only a forward that a backward follows.
    """
    # The grad mode is read here: inside a compiled graph gradients are always off when the operator runs.
    # Outside of one, the operator's dispatch would cost more than the counting.
    run = torch.ops.moe_plugin.count_ if torch.compiler.is_compiling() else _count
    run(
        tally,
        poison,
        expert_ids_TK,
        selected_TK,
        scores_TE,
        valid_T,
        used_TK,
        training,
        torch.is_grad_enabled(),
    )


def _count(
    tally: Tensor,
    poison: Tensor | None,
    expert_ids_TK: Tensor,
    selected_TK: Tensor,
    scores_TE: Tensor | None,
    valid_T: Tensor | None,
    used_TK: Tensor | None,
    training: bool,
    grad_enabled: bool,
) -> None:
    if training and not is_training_forward(grad_enabled):
        return
    ids_N = expert_ids_TK.reshape(-1)
    if valid_T is None and used_TK is None:
        tally.scatter_add_(0, ids_N, _ones(ids_N.shape[0], tally.device))
    else:
        weights_TK = _weights(expert_ids_TK, valid_T, used_TK)
        tally.scatter_add_(0, ids_N, weights_TK.reshape(-1))
        num_experts = tally.numel() - EXTRA_SLOTS
        if valid_T is not None:
            tally[num_experts + 1].add_(ids_N.numel())
        if used_TK is not None:
            tally[num_experts + 2].add_(len(weights_TK) if valid_T is None else valid_T.sum())
        selected_TK = selected_TK.reshape(weights_TK.shape).masked_fill(weights_TK == 0, 0.0)
    if poison is not None:
        poison_(poison, selected_TK)
    if scores_TE is not None:
        spread_T = _spread(scores_TE)
        tally[-1].add_((spread_T if valid_T is None else spread_T * valid_T.reshape(-1)).sum())


def _weights(expert_ids_TK: Tensor, valid_T: Tensor | None, used_TK: Tensor | None) -> Tensor:
    """1 for each selection that counts, else 0; int64 (T, K)."""
    top_k = expert_ids_TK.shape[-1]
    if used_TK is None:
        assert valid_T is not None
        return valid_T.reshape(-1, 1).long().expand(-1, top_k)
    weights_TK = used_TK.reshape(-1, top_k).long()
    return weights_TK if valid_T is None else weights_TK * valid_T.reshape(-1, 1)


@lru_cache(maxsize=256)
def _ones(count: int, device: torch.device) -> Tensor:
    """Ones that take the room of one."""
    return torch.ones(1, dtype=torch.int64, device=device).expand(count)


def poison_(poison: Tensor, values: Tensor) -> None:
    """Turn ``poison`` into NaN if a value is NaN or infinite: then so is the sum, and times zero that is NaN."""
    poison.addcmul_(values.sum(dtype=torch.float32), poison)


def _spread(scores_TE: Tensor) -> Tensor:
    """Standard deviation over the experts of each token, int64 in units of 1 / SPREAD_UNIT.

    Experts that a group limit has masked (infinite, or exactly zero in some hosts) are left out.
    """
    scores_TE = scores_TE.reshape(-1, scores_TE.shape[-1]).float()
    open_TE = scores_TE.isfinite() & (scores_TE != 0)
    open_T = open_TE.sum(-1).clamp(min=1)
    mean_T = scores_TE.where(open_TE, 0.0).sum(-1) / open_T
    deviation_TE = (scores_TE - mean_T[:, None]).where(open_TE, 0.0)
    return ((deviation_TE.square().sum(-1) / open_T).sqrt() * SPREAD_UNIT).round().long()


_LIBRARY.impl("count_", _count, "CompositeExplicitAutograd")
torch.library.register_fake("moe_plugin::count_", lambda *_: None, lib=_LIBRARY)
