"""Pieces of references, written as loops over tokens.

Shape legend: T tokens, D model width, E experts, K experts selected per token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def best(ranked_TE: Tensor, k: int) -> Tensor:
    """Return the ids (T, K) of the best experts of each token, the best first.

    Args:
        ranked_TE: Scores, biased.
        k: K.
    """
    rows = ranked_TE.tolist()
    return torch.tensor([sorted(range(len(row)), key=lambda e: -row[e])[:k] for row in rows])


def in_rounds(*rounds_TE: Tensor) -> Tensor:
    """Return the ids (T, K) of experts chosen one after another, each the best that is left.

    Args:
        rounds_TE: What each round ranks, biased.
    """
    ids_TK = []
    for rows in zip(*(ranked_TE.tolist() for ranked_TE in rounds_TE), strict=True):
        taken: list[int] = []
        for row in rows:
            taken.append(max((e for e in range(len(row)) if e not in taken), key=lambda e: row[e]))
        ids_TK.append(taken)
    return torch.tensor(ids_TK)


def mix(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, expert: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Return the weighted sum of the experts' outputs of each token.

    Args:
        x_TD: Tokens.
        ids_TK: Experts.
        weights_TK: Gate weights; tokens that were dropped have 0.
        expert: Computes expert ``e`` on (1, D).
    """
    sums = []
    for t, ids in enumerate(ids_TK.tolist()):
        parts = [weights_TK[t, place] * expert(e, x_TD[t : t + 1])[0] for place, e in enumerate(ids)]
        sums.append(torch.stack(parts).sum(0))
    return torch.stack(sums)


def first_come(
    ids_TK: Tensor,
    capacity: int,
    *,
    order: Iterable[int] | None = None,
    wanted_TK: Tensor | None = None,
    dropped_take_room: bool = True,
) -> Tensor:
    """Return which choices (T, K) fit, if an expert takes ``capacity`` tokens: all first choices, then second ones.

    Args:
        ids_TK: Experts.
        capacity: Tokens per expert.
        order: In which order tokens come; None is their own.
        wanted_TK: Which choices count; None is all.
        dropped_take_room: Whether choices that did not fit keep out those of later rounds.
    """
    kept_TK, taken = torch.zeros_like(ids_TK, dtype=torch.bool), Counter[int]()
    order = list(range(len(ids_TK)) if order is None else order)
    for place in range(ids_TK.shape[1]):
        waiting = Counter(taken)
        for t in order:
            if wanted_TK is not None and not wanted_TK[t, place]:
                continue
            e = int(ids_TK[t, place])
            kept_TK[t, place] = fits = waiting[e] < capacity
            waiting[e] += 1
            taken[e] += fits or dropped_take_room
    return kept_TK


def normalised(weights_TK: Tensor, eps: float = 0.0) -> Tensor:
    """Return weights with sum 1 per token.

    Args:
        weights_TK: Weights.
        eps: Added to the sum.
    """
    return weights_TK / (weights_TK.sum(1, keepdim=True) + eps)


def of(block_experts: Iterable[Callable[[Tensor], Tensor]]) -> Callable[[int, Tensor], Tensor]:
    """Return how to call an expert of a list by its id."""
    experts = list(block_experts)
    return lambda e, x: experts[e](x)
