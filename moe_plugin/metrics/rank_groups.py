"""The load of ranks with several experts each, which expert parallelism waits for.

Shape legend: N batches, L MoE layers, E experts (of the layer that has most), R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_plugin.metrics.violation import max_violation

RANKS = (8, 16, 64)


def rank_violation(tokens_NLE: Tensor, num_experts: Sequence[int], ranks: int) -> Tensor:
    """Return MaxVio of the tokens per rank, if each rank has `E / ranks` neighbouring experts.

    Args:
        tokens_NLE: Counts; int64, rows of smaller layers end in zeros.
        num_experts: The experts of each layer.
        ranks: R.

    Returns:
        float64 (N, L); NaN for layers whose experts do not divide over the ranks.
    """
    violation_NL = torch.full(tokens_NLE.shape[:2], torch.nan, dtype=torch.float64)
    for experts in set(num_experts):
        if experts % ranks == 0:
            layers = [place for place, size in enumerate(num_experts) if size == experts]
            tokens_NLR = tokens_NLE[:, layers, :experts].unflatten(-1, (ranks, -1)).sum(-1)
            violation_NL[:, layers] = max_violation(tokens_NLR)
    return violation_NL
