"""How a router decides: how sure it is, how often the bias overrules it, how far apart its scores are.

Shape legend: T tokens, K experts selected per token, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def router_confidence(scores_TE: Tensor, expert_ids_TK: Tensor, used_TK: Tensor) -> Tensor:
    """Return the correlation between a token's scores and its selection, mean over tokens.

    It is 1 if the selected experts share one score and all others another, and about 0 if the selection has nothing to
    do with the scores (the bias alone decides). It means the same for every score function and any E and K.

    Args:
        scores_TE: Unbiased scores; floating point, (T, E). Infinite ones (closed groups) are left out.
        expert_ids_TK: Selected experts; int64 (T, K).
        used_TK: Which of them count as selected; bool.

    Returns:
        fp32 scalar; NaN if no token has two different scores.
    """
    open_TE = scores_TE.isfinite()
    chosen_TE = torch.zeros_like(open_TE).scatter_(1, expert_ids_TK, used_TK) & open_TE
    experts_T1 = open_TE.sum(-1, keepdim=True).clamp(min=1)
    scores_TE = _centred(scores_TE.float().where(open_TE, 0.0), open_TE, experts_T1)
    picks_TE = _centred(chosen_TE.float(), open_TE, experts_T1)
    scale_T = (scores_TE.square().sum(-1) * picks_TE.square().sum(-1)).sqrt()
    return ((scores_TE * picks_TE).sum(-1) / scale_T)[scale_T > 0].mean()


def flip_rate(scores_TE: Tensor, expert_ids_TK: Tensor, used_TK: Tensor) -> Tensor:
    """Return the share of the selections that the bias made: without it another expert would have won.

    Args:
        scores_TE: Unbiased scores, (T, E).
        expert_ids_TK: Selected experts; int64 (T, K).
        used_TK: Which of them count as selected; bool. A token's other experts are compared with as many of the best.

    Returns:
        fp32 scalar between 0 and 1.
    """
    best_TK = scores_TE.topk(expert_ids_TK.shape[-1], dim=-1).values
    least_T1 = best_TK.gather(1, used_TK.sum(-1, keepdim=True).sub(1).clamp(min=0))
    flips_TK = (scores_TE.gather(1, expert_ids_TK) < least_T1) & used_TK
    return flips_TK.sum() / used_TK.sum().clamp(min=1)


def score_range(scores_TE: Tensor) -> Tensor:
    """Return the largest minus the smallest finite score of a token, mean over tokens; fp32 scalar."""
    open_TE = scores_TE.isfinite()
    scores_TE = scores_TE.float()
    highest_T = scores_TE.where(open_TE, -torch.inf).amax(-1)
    lowest_T = scores_TE.where(open_TE, torch.inf).amin(-1)
    return (highest_T - lowest_T).clamp(min=0).mean()


def _centred(values_TE: Tensor, open_TE: Tensor, experts_T1: Tensor) -> Tensor:
    return (values_TE - values_TE.sum(-1, keepdim=True) / experts_T1).where(open_TE, 0.0)
