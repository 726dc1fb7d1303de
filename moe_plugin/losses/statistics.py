"""What auxiliary losses need to know about a router's decisions.

Shape legend: B sequences, S tokens of a sequence, T = B * S tokens, E experts, K experts selected per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_plugin.types import Routing


class LoadStatistics(NamedTuple):
    """The decisions of one router in one forward, summed up.

    Small, and made of tensors only: a layer under activation checkpointing can return it, and losses are computed
    outside of what is recomputed.

    Attributes:
        probability_BE: Mean over a sequence's tokens of the router's probability for each expert; fp32, with gradient.
        counts_BE: Selections of each expert that tokens use; int64.
        square_log_z_B: Mean over a sequence's tokens of the squared log-sum-exp of the logits; fp32, with gradient.
    """

    probability_BE: Tensor
    counts_BE: Tensor
    square_log_z_B: Tensor


def load_statistics(routing: Routing, probabilities_TE: Tensor, num_sequences: int) -> LoadStatistics:
    """Sum up what a router decided.

    Args:
        routing: Its decisions, for sequences of equal length one after another.
        probabilities_TE: Its scores as a distribution, see `Score.probabilities`.
        num_sequences: B.
    """
    assert routing.logits_TE is not None, "routers give their logits"
    num_experts = probabilities_TE.shape[-1]
    ids_BP = routing.expert_ids_TK.reshape(num_sequences, -1)
    used_TK = torch.ones_like(ids_BP) if routing.used_TK is None else routing.used_TK.long()
    counts_BE = ids_BP.new_zeros(num_sequences, num_experts).scatter_add_(1, ids_BP, used_TK.view_as(ids_BP))
    length = max(1, len(probabilities_TE) // max(1, num_sequences))
    return LoadStatistics(
        probabilities_TE.unflatten(0, (num_sequences, -1)).sum(1) / length,
        counts_BE,
        routing.logits_TE.logsumexp(-1).square().view(num_sequences, -1).sum(1) / length,
    )
