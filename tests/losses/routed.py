"""Routing to compute losses of, and the losses once more in plain Python."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from moe_plugin.losses import LoadStatistics, load_statistics
from moe_plugin.types import Routing

E, K, S = 6, 2, 5


def statistics_of(logits_TE: torch.Tensor, sequences: int, top_k: int = K) -> LoadStatistics:
    """Softmax routing of these logits."""
    scores_TE = logits_TE.softmax(-1)
    weights_TK, ids_TK = scores_TE.topk(top_k)
    return load_statistics(Routing(weights_TK, ids_TK, scores_TE, logits_TE), scores_TE, sequences)


def slow_load(rows: list[list[float]], top_k: int = K) -> float:
    """``E sum_e f_e P_e`` over tokens with these logits."""
    total, experts = 0.0, range(len(rows[0]))
    softmax = [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in rows]
    chosen = [sorted(experts, key=lambda e, row=row: -row[e])[:top_k] for row in rows]
    for expert in experts:
        share = sum(expert in ids for ids in chosen) / (len(rows) * top_k)
        total += share * sum(row[expert] for row in softmax) / len(rows)
    return len(experts) * total


class Gate(torch.nn.Module):
    """Two layers of router weights; `logits(x_TD)` gives those of each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.second = (torch.nn.Parameter(torch.randn(E, 4)) for _ in range(2))

    def statistics(self, x_TD: torch.Tensor) -> list[LoadStatistics]:
        weights = (self.first, self.second)
        return [statistics_of(functional.linear(x_TD, weight), len(x_TD) // S) for weight in weights]

    def gradient(self) -> torch.Tensor:
        return torch.cat([parameter.grad for parameter in self.parameters()])
