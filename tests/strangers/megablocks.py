"""MegaBlocks: a router that appends its logits to a global list, and a layer that appends its loss to another."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from torch import nn

from tests.strangers.slow import best, mix, normalised
from tests.strangers.stranger import D, E, Stranger, random_

_ROUTER_LOGITS: list = []
_LOAD_BALANCING_LOSS: list = []


def _save_router_logits(logits, args):
    if args.moe_zloss_weight == 0:
        return
    _ROUTER_LOGITS.append(logits)


class LearnedRouter(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.layer = nn.Linear(D, args.moe_num_experts, bias=False)

    def jitter(self, x):
        low, high = 1.0 - self.args.moe_jitter_eps, 1.0 + self.args.moe_jitter_eps
        return low + torch.rand(x.size(), dtype=x.dtype) * (high - low)

    def _top_k(self, scores):
        if self.args.moe_top_k == 1:
            return scores.max(dim=-1, keepdim=True)
        return torch.topk(scores, self.args.moe_top_k, dim=-1)

    def forward(self, x):
        if self.training and self.args.moe_jitter_eps is not None:
            x = x * self.jitter(x)
        logits = self.layer(x.view(-1, x.shape[-1]))
        _save_router_logits(logits, self.args)
        scores = logits.softmax(dim=-1)
        weights, indices = self._top_k(scores)
        if self.args.moe_normalize_expert_weights:
            weights = weights / torch.norm(
                weights, p=self.args.moe_normalize_expert_weights, dim=-1, keepdim=True
            )
        return scores, weights, indices


class ParallelMLP(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.num_experts, self.top_k = args.moe_num_experts, args.moe_top_k
        self.w1 = nn.Parameter(torch.empty(E, D, D))

    def forward(self, x, scores, weights, indices):
        flat, top_expert = x.view(-1, D), indices.flatten()
        bin_ids, order = torch.sort(top_expert.int())
        counts = torch.bincount(bin_ids, minlength=self.num_experts)
        _LOAD_BALANCING_LOSS.append((counts, scores))
        tokens = order // self.top_k
        parts = torch.split(flat[tokens], counts.tolist())
        out = torch.cat([part @ self.w1[e] for e, part in enumerate(parts)])
        return (
            torch.zeros_like(flat)
            .index_add(0, tokens, out * weights.flatten()[order].unsqueeze(1))
            .view(x.shape)
        )


class MoE(nn.Module):
    def __init__(self, top_k, normalize, jitter):
        super().__init__()
        args = SimpleNamespace(
            moe_num_experts=E,
            moe_top_k=top_k,
            moe_normalize_expert_weights=normalize,
            moe_jitter_eps=jitter,
            moe_zloss_weight=1e-3,
        )
        self.router, self.experts = LearnedRouter(args), ParallelMLP(args)

    def forward(self, x):
        return self.experts(x, *self.router(x))


def reference(block, x, bias_E):
    x_TD, args = x.reshape(-1, D), block.router.args
    jittered_TD = x_TD
    if args.moe_jitter_eps is not None:
        low, high = 1 - args.moe_jitter_eps, 1 + args.moe_jitter_eps
        jittered_TD = x_TD * (low + torch.rand(x_TD.shape, dtype=x.dtype) * (high - low))
    scores_TE = block.router.layer(jittered_TD).softmax(1)
    ids_TK = best(scores_TE + bias_E, args.moe_top_k)
    weights_TK = scores_TE.gather(1, ids_TK)
    if args.moe_normalize_expert_weights:
        weights_TK = normalised(weights_TK)
    return ids_TK, mix(x_TD, ids_TK, weights_TK, lambda e, x: x @ block.experts.w1[e]).view_as(x)


_shape = partial(
    Stranger,
    "databricks/megablocks",
    "78eea65fda01e638af36ae38853bc51efb04a4b4",
    "megablocks/layers/router.py",
    reference=reference,
    router="router",
    shared=(_ROUTER_LOGITS, _LOAD_BALANCING_LOSS),
)
BLOCKS = {
    "MegaBlocks LearnedRouter, k=1": _shape(build=lambda: random_(MoE(1, None, None)), top_k=1),
    "MegaBlocks LearnedRouter, k=2": _shape(build=lambda: random_(MoE(2, 1, 0.01))),
}
