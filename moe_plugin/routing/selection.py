"""Which experts a token is sent to, given biased scores.

Shape legend: T tokens, E experts, K experts selected per token, G groups, M experts in a group.
"""

from __future__ import annotations

import torch
from torch import Tensor


def select_top_k(biased_scores_TE: Tensor, top_k: int) -> Tensor:
    """Selects the experts with the highest biased scores.

    Args:
        biased_scores_TE: Scores plus selection bias. NaN counts as the highest score, as in `torch.topk`, so
            that the ids stay valid and the NaN shows up in the loss.
        top_k: Experts per token.

    Returns:
        expert_ids_TK, int64, best first.
    """
    # Unpacked, not `.indices`: whoever intercepts the call may return a plain tuple.
    _, expert_ids_TK = torch.topk(biased_scores_TE, top_k, dim=-1)
    return expert_ids_TK


def limit_to_groups(biased_scores_TE: Tensor, num_groups: int, top_k_groups: int) -> Tensor:
    """Sets the scores outside each token's best groups of experts to -inf.

    Experts are grouped by consecutive id. A group's score is the sum of its two best biased scores:
    arXiv 2412.19437, section 2.1.2.

    Args:
        biased_scores_TE: Scores plus selection bias; E divisible by `num_groups`, at least 2 experts a group.
        num_groups: Groups that the experts are divided into.
        top_k_groups: Groups a token may choose from.

    Returns:
        A copy of `biased_scores_TE`, -inf outside the chosen groups.
    """
    grouped_TGM = biased_scores_TE.unflatten(-1, (num_groups, -1))
    _, group_ids = torch.topk(_sum_of_two_best(grouped_TGM), top_k_groups, dim=-1, sorted=False)
    outside_TG = torch.ones(grouped_TGM.shape[:-1], dtype=torch.bool, device=group_ids.device)
    outside_TG.scatter_(-1, group_ids, False)
    return grouped_TGM.masked_fill(outside_TG.unsqueeze(-1), -torch.inf).flatten(-2)


def _sum_of_two_best(grouped_TGM: Tensor) -> Tensor:
    """Sum of the two largest of each group; two `amax` passes are about twice as fast as `topk(2)`."""
    best_TG1 = grouped_TGM.amax(dim=-1, keepdim=True)
    is_best_TGM = grouped_TGM == best_TG1
    second_TG = grouped_TGM.masked_fill(is_best_TGM, -torch.inf).amax(dim=-1)
    best_TG = best_TG1.squeeze(-1)
    tied_TG = is_best_TGM.sum(dim=-1) > 1
    return best_TG + torch.where(tied_TG, best_TG, second_TG)
