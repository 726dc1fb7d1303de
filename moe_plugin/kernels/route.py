"""Routing with fixed k in one call, in pure torch: score, add the bias, select, look up, count.

Shape legend: T tokens, E experts, K experts selected per token.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from moe_plugin.errors import ConfigError
from moe_plugin.routing.scores import Score


class Selected(NamedTuple):
    """What `route` gives.

    Attributes:
        expert_ids_TK: Selected experts, best first; int64.
        scores_TK: Their unbiased scores; fp32.
        counts_E: Valid tokens sent to each expert; int64.
    """

    expert_ids_TK: Tensor
    scores_TK: Tensor
    counts_E: Tensor


def route(
    logits_TE: Tensor, bias_E: Tensor, score: Score, top_k: int, valid_T: Tensor | None = None
) -> Selected:
    """Selects the experts with the highest score plus bias: arXiv 2408.15664, equation 3.

    Of equal ones the lowest ids are selected, which `torch.topk` does not promise. NaN counts as the highest score,
    as it does there. Nothing has a gradient.

    Args:
        logits_TE: fp32.
        bias_E: Selection bias, fp32.
        score: Score function.
        top_k: Experts per token.
        valid_T: bool, False for tokens that must not be counted; None counts all.

    Raises:
        ConfigError: There are fewer than `top_k` experts.
    """
    check_top_k(top_k, logits_TE)
    scores_TE = score.scores(logits_TE.detach())
    expert_ids_TK = (scores_TE + bias_E).sort(dim=-1, descending=True, stable=True)[1][:, :top_k]
    counts_E = expert_ids_TK.new_zeros(logits_TE.shape[1])
    counted_TK = expert_ids_TK.new_ones(len(logits_TE), 1) if valid_T is None else valid_T.long()[:, None]
    counts_E.scatter_add_(0, expert_ids_TK.flatten(), counted_TK.expand(-1, top_k).flatten())
    return Selected(expert_ids_TK, scores_TE.gather(-1, expert_ids_TK), counts_E)


def check_top_k(top_k: int, logits_TE: Tensor) -> None:
    """Checks that there are as many experts.

    Raises:
        ConfigError: There are not.
    """
    if not 1 <= top_k <= logits_TE.shape[1]:
        raise ConfigError(f"'top_k' must be between 1 and num_experts ({logits_TE.shape[1]}), got {top_k}.")
