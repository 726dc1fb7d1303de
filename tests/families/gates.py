"""Compute gate weights independently, from a router's scores of all experts and the ids it chose.

Shape legend: T tokens, K experts selected per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from moe_plugin.attach.discovery.probing.trace import tensors_in

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_TE: logits_TE.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits_TE: softplus(logits_TE).sqrt(),
    "given": lambda scores_TE: scores_TE,
}


def explained(output: Any, num_experts: int, top_k: int) -> str | None:
    """Return which function of the scores the gate weights are, up to a factor or a sum; None if unknown.

    Raises:
        AssertionError: If the output has scores, weights and ids, and no formula gives the weights.
    """
    tensors = [tensor.detach() for tensor in tensors_in(output)]
    logits = [
        t.float().reshape(-1, num_experts)
        for t in tensors
        if t.is_floating_point() and t.shape[-1] == num_experts
    ]
    chosen = [t.reshape(-1, top_k) for t in tensors if t.shape[-1] == top_k]
    weights = [t.float() for t in chosen if t.is_floating_point()]
    ids = [t for t in chosen if not t.is_floating_point()]
    if not (logits and weights and ids) or num_experts == top_k:
        return None
    for name, score in SCORES.items():
        if _proportional(weights[0], score(logits[0]).gather(1, ids[0])):
            return name
    raise AssertionError("the gate weights follow from no formula of the unbiased scores")


def _proportional(ours_TK: Tensor, theirs_TK: Tensor) -> bool:
    """Return whether the weights are the scores times one factor, or each token's scores scaled to one sum."""
    ratio_TK, sum_T = ours_TK / theirs_TK, ours_TK.sum(-1)
    per_token = _same(ratio_TK, ratio_TK[:, :1])
    return per_token and (
        _same(ratio_TK, ratio_TK[:1, :1]) or (_same(sum_T, sum_T[:1]) and ours_TK.shape[1] > 1)
    )


def _same(values: Tensor, one: Tensor) -> bool:
    return torch.allclose(values, one.expand_as(values), rtol=1e-3, atol=1e-6)
