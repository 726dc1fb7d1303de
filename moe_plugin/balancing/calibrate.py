"""The bias that balances given scores, found at once instead of step by step.

Shape legend: T tokens, E experts, K experts selected per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_ROUNDS = 200
"""Rounds after which the best bias so far is taken; a few dozen are usual."""
TOLERANCE = 0.005
"""Excess of the largest load over the mean at which to stop, far below the sampling error of a few batches."""


@torch.no_grad()
def solve_bias(scores_TE: Tensor, top_k: int, bias_E: Tensor) -> Tensor:
    """Return the bias under which the top-k of ``scores_TE + bias_E`` uses every expert equally often.

    Solves the dual of balanced assignment: the bias that minimises ``sum_t topk_sum(s_t + b) - (T K / E) sum_e b_e``, a
    convex function whose gradient is the load error. In each round every expert takes the quantile of its margins, how
    much its score misses the K-th best of the other experts, at which it would get its share if the others stayed; all
    move half of the way there, as they move against one another.

    Deterministic. Tokens with equal scores move together, so they are balanced only as far as scores differ. An expert
    that is masked for all tokens keeps its bias.

    Args:
        scores_TE: Unbiased scores, any floating dtype; not finite if a token may not select an expert.
        top_k: K.
        bias_E: Where to start; fp32 (E,).

    Returns:
        The best bias found; fp32 (E,), with zero mean over the experts. ``bias_E`` if there is nothing to solve.
    """
    num_tokens, num_experts = scores_TE.shape
    if num_tokens == 0 or top_k >= num_experts:
        return bias_E.clone()
    scores_TE = scores_TE.float().where(scores_TE.isfinite(), -torch.inf)
    share_E = _shares(scores_TE.isfinite(), top_k)
    best_E, least = bias_E, float("inf")
    for _ in range(MAX_ROUNDS):
        ranked_TE = scores_TE + bias_E
        excess = float((_counts(ranked_TE, top_k) - share_E * (1 + TOLERANCE)).max())
        if excess < least:
            best_E, least = bias_E, excess
        if excess <= 1:
            break
        bias_E = bias_E + 0.5 * _quantile(_margins(ranked_TE, top_k), share_E)
    return best_E - best_E.mean()


def _shares(open_TE: Tensor, top_k: int) -> Tensor:
    """Return tokens per expert if all that compete share evenly; fp32 (E,).

    If groups of experts are masked, experts that are never open to the same token do not compete, even over others.
    """
    linked_EE = open_TE.float().T @ open_TE.float() > 0
    for _ in range(len(linked_EE).bit_length()):
        linked_EE = linked_EE.float() @ linked_EE.float() > 0
    picks_T = open_TE.sum(1).clamp(max=top_k).float()
    of_token_TE = linked_EE[open_TE.int().argmax(1)] & (picks_T > 0)[:, None]
    return (picks_T[:, None] * of_token_TE).sum(0) / linked_EE.sum(0).clamp(min=1)


def _counts(ranked_TE: Tensor, top_k: int) -> Tensor:
    """Return tokens per expert; int64 (E,)."""
    ids_TK = ranked_TE.topk(top_k).indices
    return torch.bincount(ids_TK.flatten(), minlength=ranked_TE.shape[-1])


def _margins(ranked_TE: Tensor, top_k: int) -> Tensor:
    """Return what each score misses to equal the K-th best of the token's other experts; fp32 (T, E)."""
    best = ranked_TE.topk(top_k + 1).values
    last_T1, next_T1 = best[:, -2:-1], best[:, -1:]
    threshold_TE = torch.where(ranked_TE >= last_T1, next_T1, last_T1)
    # Masked experts never get in (inf); those without an open competitor are always in (-inf).
    return torch.where(ranked_TE.isfinite(), threshold_TE - ranked_TE, torch.inf)


def _quantile(margins_TE: Tensor, share_E: Tensor) -> Tensor:
    """Return the step that lets about ``share_E`` tokens in, between two margins; fp32 (E,), 0 where none is finite."""
    finite_TE = margins_TE.isfinite()
    least_E = margins_TE.where(finite_TE, torch.inf).amin(0)
    most_E = margins_TE.where(finite_TE, -torch.inf).amax(0)
    below_E = torch.empty_like(share_E)
    for inside in share_E.round().clamp(min=1).long().unique().tolist():  # one number unless groups are apart
        alike_E = share_E.round().clamp(min=1) == inside
        below_E[alike_E] = margins_TE[:, alike_E].kthvalue(inside, dim=0).values
    below_E = below_E.clamp(least_E, most_E)
    above_E = margins_TE.where(margins_TE > below_E, torch.inf).amin(0).clamp(max=most_E)
    return ((below_E + above_E) / 2).nan_to_num(0.0, 0.0, 0.0)
