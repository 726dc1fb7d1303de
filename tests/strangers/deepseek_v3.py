"""DeepSeek-V3: the gate of its own inference code, with groups and a bias of its own, or without both.

With groups and without a bias it masks the scores in place, so no backward follows: that cannot be trained.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from tests.strangers.slow import best, mix, normalised, of
from tests.strangers.stranger import D, E, Stranger, random_


class Gate(nn.Module):
    def __init__(self, score_func, has_bias):
        super().__init__()
        self.topk, self.n_groups, self.topk_groups = 2, 3 if has_bias else 1, 2
        self.score_func, self.route_scale = score_func, 1.5
        self.weight = nn.Parameter(torch.empty(E, D))
        self.bias = nn.Parameter(torch.empty(E, dtype=torch.float32)) if has_bias else None

    def forward(self, x):
        scores = functional.linear(x, self.weight)
        is_softmax = self.score_func == "softmax"
        scores = scores.softmax(dim=-1, dtype=torch.float32) if is_softmax else scores.sigmoid()
        original_scores = scores
        if self.bias is not None:
            scores = scores + self.bias
        if self.n_groups > 1:
            scores = scores.view(x.size(0), self.n_groups, -1)
            group_scores = scores.topk(2, dim=-1)[0].sum(dim=-1)
            indices = group_scores.topk(self.topk_groups, dim=-1)[1]
            mask = scores.new_ones(x.size(0), self.n_groups, dtype=bool).scatter_(1, indices, False)
            scores = scores.masked_fill_(mask.unsqueeze(-1), float("-inf")).flatten(1)
        indices = torch.topk(scores, self.topk, dim=-1)[1]
        weights = original_scores.gather(1, indices)
        if self.score_func == "sigmoid":
            weights /= weights.sum(dim=-1, keepdim=True)
        weights *= self.route_scale
        return weights.type_as(x), indices


class MoE(nn.Module):
    def __init__(self, score_func, has_bias):
        super().__init__()
        self.n_routed_experts, self.n_activated_experts = E, 2
        self.gate = Gate(score_func, has_bias)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        self.shared_experts = nn.Linear(D, D)

    def forward(self, x):
        shape, x = x.shape, x.view(-1, D)
        weights, indices = self.gate(x)
        y = torch.zeros_like(x)
        counts = torch.bincount(indices.flatten(), minlength=self.n_routed_experts).tolist()
        for i in range(self.n_routed_experts):
            if counts[i] == 0:
                continue
            idx, top = torch.where(indices == i)
            y[idx] += self.experts[i](x[idx]) * weights[idx, top, None]
        return (y + self.shared_experts(x)).view(shape)


def reference(block, x, bias_E):
    x_TD, gate = x.reshape(-1, D), block.gate
    logits_TE = x_TD @ gate.weight.T
    scores_TE = logits_TE.softmax(-1, dtype=torch.float32)
    if gate.score_func == "sigmoid":
        scores_TE = logits_TE.sigmoid()
    ranked_TE = scores_TE + bias_E
    if gate.n_groups > 1:
        size = E // gate.n_groups  # a group has two experts: its best two are all of it
        groups_TG = ranked_TE.view(len(x_TD), gate.n_groups, size).sum(-1)
        for t, groups in enumerate(best(groups_TG, gate.topk_groups).tolist()):
            ranked_TE[t, [e for e in range(E) if e // size not in groups]] = -torch.inf
    ids_TK = best(ranked_TE, 2)
    weights_TK = scores_TE.gather(1, ids_TK)
    weights_TK = (normalised(weights_TK) if gate.score_func == "sigmoid" else weights_TK) * 1.5
    return ids_TK, (mix(x_TD, ids_TK, weights_TK, of(block.experts)) + block.shared_experts(x_TD)).view_as(x)


_shape = partial(
    Stranger,
    "deepseek-ai/DeepSeek-V3",
    "9b4e9788e4a3a731f7567338ed15d3ec549ce03b",
    "inference/model.py",
    reference=reference,
    router="gate",
)
BLOCKS = {
    "DeepSeek-V3 Gate, with bias": _shape(
        build=lambda: random_(MoE("sigmoid", has_bias=True)), bias_name="bias"
    ),
    "DeepSeek-V3 Gate, without bias": _shape(build=lambda: random_(MoE("softmax", has_bias=False))),
}
