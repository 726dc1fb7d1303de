"""MiniMind: softmax, unsorted top-k, and a loss that each forward leaves on the block."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional

from tests.strangers.slow import best, mix, normalised, of
from tests.strangers.stranger import D, E, Stranger


class MOEFeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(num_experts=E, num_experts_per_tok=2, router_aux_loss_coef=0.01)
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x):
        flat = x.view(-1, D)
        scores = functional.softmax(self.gate(flat), dim=-1)
        weight, ids = torch.topk(scores, k=self.config.num_experts_per_tok, dim=-1, sorted=False)
        weight = weight / (weight.sum(dim=-1, keepdim=True) + 1e-20)
        y = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            mask = ids == i
            if mask.any():
                rows = mask.any(dim=-1).nonzero().flatten()
                y.index_add_(0, rows, (expert(flat[rows]) * weight[mask].view(-1, 1)).to(y.dtype))
            elif self.training:
                y[0, 0] += 0 * sum(p.sum() for p in expert.parameters())
        self.aux_loss = scores.new_zeros(1).squeeze()
        if self.training and self.config.router_aux_loss_coef > 0:
            load = functional.one_hot(ids, E).float().mean(0)
            self.aux_loss = (load * scores.mean(0)).sum() * E * self.config.router_aux_loss_coef
        return y.view(x.shape)


def reference(block, x, bias_E):
    x_TD = x.reshape(-1, D)
    scores_TE = block.gate(x_TD).softmax(-1)
    ids_TK = best(scores_TE + bias_E, 2)
    return ids_TK, mix(x_TD, ids_TK, normalised(scores_TE.gather(1, ids_TK)), of(block.experts)).view_as(x)


BLOCKS = {
    "MiniMind MOEFeedForward": Stranger(
        "jingyaogong/minimind",
        "d65ef2c00ebc6082f9df11541e1b191655eddb00",
        "model/model_minimind.py",
        MOEFeedForward,
        reference,
        in_order=False,
    )
}
