"""Selection of experts by biased scores.

Shape legend: T tokens, E experts, K experts selected per token, G groups, M experts in a group.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def select_top_k(biased_scores_TE: Tensor, top_k: int) -> Tensor:
    """Select the experts with the highest biased scores.

    Args:
        biased_scores_TE: Scores plus selection bias. NaN counts as the highest score, as in `torch.topk`: the ids stay
            valid, and the NaN shows up in the loss.
        top_k: Experts per token.

    Returns:
        expert_ids_TK, int64, best first.
    """
    # Unpacked, not `.indices`: an interception of the call may return a plain tuple.
    _, expert_ids_TK = torch.topk(biased_scores_TE, top_k, dim=-1)
    return expert_ids_TK


def limit_to_groups(biased_scores_TE: Tensor, num_groups: int, top_k_groups: int) -> Tensor:
    """Set the scores outside each token's best groups of experts to -inf.

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
    """Return the sum of the two largest of each group, as `topk(2)` finds them but without sorting: six times as fast.

    Halves are compared elementwise until one is left; the second best of each is kept as well.
    """
    size = grouped_TGM.shape[-1]
    if missing := 2 ** (size - 1).bit_length() - size:
        grouped_TGM = functional.pad(grouped_TGM, (0, missing), value=-torch.inf)
    one_TGM, other_TGM = grouped_TGM.chunk(2, dim=-1)
    best_TGM, second_TGM = torch.maximum(one_TGM, other_TGM), torch.minimum(one_TGM, other_TGM)
    while best_TGM.shape[-1] > 1:
        one_TGM, other_TGM = best_TGM.chunk(2, dim=-1)
        second_TGM = torch.maximum(*second_TGM.chunk(2, dim=-1))
        second_TGM = torch.maximum(second_TGM, torch.minimum(one_TGM, other_TGM))
        best_TGM = torch.maximum(one_TGM, other_TGM)
    return (best_TGM + second_TGM).squeeze(-1)
