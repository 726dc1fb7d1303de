"""Exact counting of the tokens each expert received.

Shape legend: T tokens, K experts selected per token, N selections (T x K), E experts, S slots (E + EXTRA_SLOTS),
X slots E + 1 to E + 3.

A tally is one int64 tensor per routing site, so one exact, order-independent sum shares everything between ranks. The
functions below read its slots, of one site or of several:

    [0, E)  tokens per expert
    E       selections whose score was NaN or infinite: in training they count here and not for their expert
    E + 1   selections seen under a mask, padding included
    E + 2   tokens, counted only if they may use different numbers of experts
    E + 3   sum over tokens of the score spread, in units of 1 / SPREAD_UNIT
    E + 4   more than zero if the step must not count for another reason, such as its loss

Counting is a ``torch.library`` operator that changes the tally, so it survives ``torch.compile`` with ``fullgraph`` and
decides when it *runs*, not when it is traced, whether this is a real forward.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from moe_plugin.balancing.recompute import is_training_forward

EXTRA_SLOTS = 5
_NOT_FINITE, _MASKED, _TOKENS, _SPREAD, _REJECTED = range(-EXTRA_SLOTS, 0)
SPREAD_UNIT = 2**24

_LIBRARY = torch.library.Library("moe_plugin", "DEF")
_LIBRARY.define(
    "count_(Tensor(a!) slots_S, Tensor expert_ids_N, Tensor? weights_N, Tensor? extra_X, bool training,"
    " bool grad_enabled) -> ()"
)


def new_tally(num_experts: int) -> Tensor:
    """Return an empty tally: int64 zeros of ``num_experts + EXTRA_SLOTS``."""
    return torch.zeros(num_experts + EXTRA_SLOTS, dtype=torch.int64)


def expert_counts(slots_S: Tensor) -> Tensor:
    """Return the tokens per expert in tallies (..., S); int64 (..., E)."""
    return slots_S[..., :_NOT_FINITE]


def num_seen(slots_S: Tensor) -> Tensor:
    """Return how many selections were seen, masked and not finite ones too; int64 (...)."""
    return slots_S[..., : _MASKED + 1].sum(-1)


def num_tokens(slots_S: Tensor) -> Tensor:
    """Return the tokens that were counted because they may use different numbers of experts; int64 (...)."""
    return slots_S[..., _TOKENS]


def spread_sum(slots_S: Tensor) -> Tensor:
    """Return the sum over tokens of the score spread; int64 (...) in units of 1 / `SPREAD_UNIT`."""
    return slots_S[..., _SPREAD]


def num_rejected(slots_S: Tensor) -> Tensor:
    """Return how many values that must be finite were not; int64 (...)."""
    return slots_S[..., _NOT_FINITE] + slots_S[..., _REJECTED]


def reject_if_(slots_S: Tensor, condition: Tensor) -> None:
    """Let the step of these tallies not count if a condition holds, without waiting for the device.

    Args:
        slots_S: Tallies; changed in place.
        condition: bool scalar.
    """
    slots_S[..., _REJECTED] += condition.to(slots_S.device)


def count_(
    slots_S: Tensor,
    expert_ids_TK: Tensor,
    selected_TK: Tensor | None = None,
    *,
    scores_TE: Tensor | None = None,
    valid_T: Tensor | None = None,
    used_TK: Tensor | None = None,
    training: bool,
) -> None:
    """Add one forward pass to a tally, in place.

    With ``training`` nothing is added during recomputation, under ``no_grad`` or in backward. Integer scatter
    addition is exact in any order and needs no host synchronisation.

    Args:
        slots_S: From `new_tally`, on the device of the ids; changed in place.
        expert_ids_TK: Selected experts, int64, any leading shape.
        selected_TK: The scores of the selected experts, checked to be finite; None skips the check.
        scores_TE: Unbiased scores of all experts, to measure their spread; None to leave it out.
        valid_T: bool, True for tokens that count, one entry per token; None when all do.
        used_TK: bool, True for selections that count, if tokens may use fewer than K experts; None when all do.
        training: Count only a forward that a backward follows.
    """
    # The grad mode is read here: inside a compiled graph gradients are always off when the operator runs.
    # Outside of one, the operator's dispatch would cost more than the counting.
    run = torch.ops.moe_plugin.count_ if torch.compiler.is_compiling() else _count
    ids_TK = expert_ids_TK if selected_TK is None else finite_ids(expert_ids_TK, selected_TK, len(slots_S))
    weights_TK = _weights(expert_ids_TK.shape[-1], valid_T, used_TK)
    run(
        slots_S,
        ids_TK.reshape(-1),
        None if weights_TK is None else weights_TK.reshape(-1),
        _extra(expert_ids_TK, scores_TE, valid_T, used_TK),
        training,
        torch.is_grad_enabled(),
    )


def finite_ids(expert_ids: Tensor, selected: Tensor, num_slots: int) -> Tensor:
    """Return the slots in which selections count: E where the score was NaN or infinite, else the expert's.

    Args:
        expert_ids: Selected experts, integers of any shape.
        selected: Their scores, same shape.
        num_slots: Slots of a tally, S.
    """
    return expert_ids.where(selected.isfinite(), num_slots + _NOT_FINITE)


def _count(
    slots_S: Tensor,
    expert_ids_N: Tensor,
    weights_N: Tensor | None,
    extra_X: Tensor | None,
    training: bool,
    grad_enabled: bool,
) -> None:
    if training and not is_training_forward(grad_enabled):
        return
    weights_N = _ones(expert_ids_N.shape[0], slots_S.device) if weights_N is None else weights_N
    slots_S.scatter_add_(0, expert_ids_N, weights_N)
    if extra_X is not None:
        slots_S[_MASKED:_REJECTED].add_(extra_X)


@lru_cache(maxsize=256)
def _ones(count: int, device: torch.device) -> Tensor:
    """Return ones that share the memory of one."""
    return torch.ones(1, dtype=torch.int64, device=device).expand(count)


def _extra(
    expert_ids_TK: Tensor, scores_TE: Tensor | None, valid_T: Tensor | None, used_TK: Tensor | None
) -> Tensor | None:
    """Return what is added to slots E + 1 to E + 3; int64, None for nothing."""
    if scores_TE is None and valid_T is None and used_TK is None:
        return None
    num_selections = expert_ids_TK.new_full((), 0 if valid_T is None else expert_ids_TK.numel())
    num_tokens, spread = torch.zeros_like(num_selections), torch.zeros_like(num_selections)
    if used_TK is not None:
        num_tokens = num_tokens + (used_TK.numel() // used_TK.shape[-1] if valid_T is None else valid_T.sum())
    if scores_TE is not None:
        spread_T = _spread(scores_TE)
        spread = (spread_T if valid_T is None else spread_T * valid_T.reshape(-1)).sum()
    return torch.stack([num_selections, num_tokens, spread])


def _weights(top_k: int, valid_T: Tensor | None, used_TK: Tensor | None) -> Tensor | None:
    """Return 1 for each selection that counts, else 0; int64 (T, K). None when all do."""
    if used_TK is None:
        return None if valid_T is None else valid_T.reshape(-1, 1).long().expand(-1, top_k)
    weights_TK = used_TK.reshape(-1, top_k).long()
    return weights_TK if valid_T is None else weights_TK * valid_T.reshape(-1, 1)


def _spread(scores_TE: Tensor) -> Tensor:
    """Return the standard deviation over the experts of each token; int64 in units of 1 / SPREAD_UNIT.

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
