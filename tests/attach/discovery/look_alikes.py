"""Routers written in as many ways as people write them, none of which the library knows of.

Every block maps (T, D) or (B, S, D) hidden states to the same shape, with E experts of which K are used.
Shape legend: T tokens, D model width, E experts, K experts selected per token.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

D, E, K = 12, 6, 2


class Blockwise(nn.Module):
    """Routes by itself; subclasses say how. Computes every expert, obviously right."""

    k = K

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.specialists = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def mix(self, x, weights_TK, ids_TK):
        x_TD = x.reshape(-1, D)
        gates_TE = x_TD.new_zeros(len(x_TD), E).scatter(1, ids_TK, weights_TK.to(x_TD.dtype))
        outputs_TED = torch.stack([expert(x_TD) for expert in self.specialists], dim=1)
        return (gates_TE.unsqueeze(-1) * outputs_TED).sum(1).view_as(x)

    def forward(self, x):
        weights_TK, ids_TK = self.route(self.gate(x.reshape(-1, D)).softmax(-1))
        return self.mix(x, weights_TK, ids_TK)

    def route(self, scores_TE):
        return scores_TE.topk(self.k)


class PositionalArguments(Blockwise):
    def route(self, scores_TE):
        return torch.topk(scores_TE, self.k, 1, True, False)


class KeywordArguments(Blockwise):
    def route(self, scores_TE):
        weights, ids = torch.topk(input=scores_TE, k=self.k, dim=-1)
        return weights / weights.sum(-1, keepdim=True), ids


class LiteralK(Blockwise):
    def route(self, scores_TE):
        values, ids = scores_TE.topk(2, dim=-1)
        return values, ids


def pick_some(scores_TE, how_many):
    return torch.topk(scores_TE, how_many)


def pick(scores_TE, how_many):
    return pick_some(scores_TE, how_many)


class ByFunction(Blockwise):
    def route(self, scores_TE):
        return pick(scores_TE, 2)


class Chooser:
    """Not a module."""

    def __call__(self, scores_TE):
        return scores_TE.topk(2)


class ByHelperObject(nn.Module):
    """No selecting name in the block's own code; its experts make it a candidate."""

    def __init__(self):
        super().__init__()
        self.gate, self.chooser = nn.Linear(D, E), Chooser()
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x):
        weights_TK, ids_TK = self.chooser(self.gate(x.reshape(-1, D)).softmax(-1))
        return Blockwise.mix(self, x, weights_TK, ids_TK)

    @property
    def specialists(self):
        return self.experts


class Sorting(Blockwise):
    def route(self, scores_TE):
        values, order = scores_TE.sort(dim=-1, descending=True)
        return values[:, :2], order[:, :2]


class ArgSorting(Blockwise):
    def route(self, scores_TE):
        ids = torch.argsort(scores_TE, dim=-1, descending=True)[..., :2]
        return scores_TE.gather(-1, ids), ids


class Top1ByMax(Blockwise):
    k = 1

    def route(self, scores_TE):
        weight, chosen = torch.max(scores_TE, dim=-1, keepdim=True)
        return weight, chosen


class Top1ByArgmaxAndOneHot(Blockwise):
    k = 1

    def forward(self, x):
        scores_TE = self.gate(x.reshape(-1, D)).softmax(-1)
        hot_TE = functional.one_hot(scores_TE.argmax(-1), E)
        weights_T1 = (scores_TE * hot_TE).sum(-1, keepdim=True)
        return self.mix(x, weights_T1, hot_TE.nonzero()[:, 1:])


class Top1ByArgmaxAndMax(Blockwise):
    k = 1

    def route(self, scores_TE):
        ids = torch.argmax(scores_TE, dim=-1)
        return scores_TE.max(dim=-1).values[:, None], ids[:, None]


class GroupsByZeros(Blockwise):
    def route(self, scores_TE):
        by_group = scores_TE.view(len(scores_TE), 2, E // 2)
        best = by_group.max(-1).values.topk(1, dim=-1).indices
        open_TE = torch.zeros(len(scores_TE), 2).scatter(1, best, 1).repeat_interleave(E // 2, 1).bool()
        return scores_TE.masked_fill(~open_TE, 0.0).topk(self.k)


class GroupsByInfinity(Blockwise):
    def route(self, scores_TE):
        by_group = scores_TE.view(len(scores_TE), 2, E // 2)
        best = by_group.topk(2, dim=-1).values.sum(-1).topk(1, dim=-1).indices
        open_TE = torch.zeros(len(scores_TE), 2).scatter(1, best, 1).repeat_interleave(E // 2, 1).bool()
        ids = scores_TE.masked_fill(~open_TE, float("-inf")).topk(self.k).indices
        return scores_TE.gather(1, ids), ids


class StackedWeights(nn.Module):
    """Experts as one 3-D tensor, sizes nowhere but in shapes, the gate a bare matrix (D, E)."""

    def __init__(self):
        super().__init__()
        self.w_gate = nn.Parameter(torch.randn(D, E))
        self.w = nn.Parameter(torch.randn(E, D, D))

    def forward(self, x):
        x_TD = x.reshape(-1, D)
        weights_TK, ids_TK = (x_TD @ self.w_gate).float().topk(2, dim=-1)
        chosen_TKD = torch.einsum("td,tkde->tke", x_TD, self.w[ids_TK])
        return (weights_TK.softmax(-1).unsqueeze(-1) * chosen_TKD).sum(1).view_as(x)


class SeparateRouter(nn.Module):
    """torchtitan style: a router module, and the bias a buffer of the block, passed in as an argument."""

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(D, E, bias=False)

        def forward(self, x_TD, nudge=None):
            scores_TE = self.lin(x_TD).sigmoid().float()
            ranked_TE = scores_TE if nudge is None else scores_TE + nudge
            _, ids_TK = torch.topk(ranked_TE, k=2, dim=1)
            counts_E = torch.histc(ids_TK.float(), bins=E, min=0, max=E)
            return scores_TE.gather(1, ids_TK), ids_TK, counts_E

    def __init__(self):
        super().__init__()
        self.router = self.Gate()
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        self.register_buffer("nudge", torch.zeros(E))
        self.register_buffer("tokens_per_expert", torch.zeros(E), persistent=False)

    def forward(self, x):
        weights_TK, ids_TK, counts_E = self.router(x.reshape(-1, D), self.nudge)
        with torch.no_grad():
            self.tokens_per_expert.add_(counts_E)
        return Blockwise.mix(self, x, weights_TK, ids_TK)

    @property
    def specialists(self):
        return self.experts


class OddlyNamedBias(Blockwise):
    """An own bias as a Parameter without a telling name, under ``no_grad``."""

    def __init__(self):
        super().__init__()
        self.zeta = nn.Parameter(torch.zeros(E), requires_grad=False)

    def route(self, scores_TE):
        with torch.no_grad():
            ids = torch.topk(scores_TE + self.zeta.unsqueeze(0), self.k, dim=-1)[1]
        return scores_TE.gather(1, ids), ids


class BiasInChild(Blockwise):
    """ERNIE style: a child adds a bias of shape (1, E)."""

    class Statics(nn.Module):
        def __init__(self):
            super().__init__()
            self.amount = nn.Parameter(torch.zeros(1, E), requires_grad=False)

        def forward(self, scores):
            return scores + self.amount.squeeze()

    def __init__(self):
        super().__init__()
        self.statics = self.Statics()

    def route(self, scores_TE):
        ids = self.statics(scores_TE).topk(self.k).indices
        return scores_TE.gather(1, ids), ids


class LinearBias(Blockwise):
    """gpt-oss style: the gate's own bias belongs to the scores, and so to the gate weights."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, D))
        self.bias = nn.Parameter(torch.randn(E))

    def forward(self, x):
        logits_TE = x.reshape(-1, D) @ self.weight.T + self.bias
        values, ids = logits_TE.topk(self.k)
        return self.mix(x, values.softmax(-1), ids)


class LoopingExperts(Blockwise):
    """A gate bias in the block that loops over the experts hit: it cannot be run to its end without data."""

    def __init__(self):
        super().__init__()
        self.gate_bias = nn.Parameter(torch.randn(E))

    def forward(self, x):
        logits_TE = self.gate(x.reshape(-1, D)) + self.gate_bias
        values, ids = logits_TE.topk(self.k)
        weights_TK = values.softmax(-1)
        assert all(0 <= expert < E for expert in ids.unique().tolist())
        return self.mix(x, weights_TK, ids)


class LoopingWithBias(LoopingExperts):
    """The same with a selection bias."""

    def forward(self, x):
        scores_TE = self.gate(x.reshape(-1, D)).sigmoid()
        _, ids = (scores_TE + self.gate_bias).topk(self.k)
        weights_TK = scores_TE.gather(1, ids)
        assert all(0 <= expert < E for expert in ids.unique().tolist())
        return self.mix(x, weights_TK, ids)


class Scaled(Blockwise):
    """Gemma-4 style: a scale per expert after the selection."""

    def __init__(self):
        super().__init__()
        self.per_expert_scale = nn.Parameter(torch.ones(E))

    def route(self, scores_TE):
        values, ids = scores_TE.topk(self.k)
        return values * self.per_expert_scale[ids], ids


class Layer(nn.Module):
    """Routes in the decoder layer itself, beside an attention with a topk of its own."""

    class SparseAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(D, D)

        def forward(self, x):
            scores = torch.einsum("...sd,...td->...st", self.q(x), x)
            kept = scores.topk(min(3, scores.shape[-1]), dim=-1)
            return torch.zeros_like(scores).scatter(-1, kept.indices, kept.values.softmax(-1)) @ x

    def __init__(self):
        super().__init__()
        self.attention, self.gate = self.SparseAttention(), nn.Linear(D, E)
        self.specialists = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x, attention_mask=None):
        x = x + self.attention(x)
        weights_TK, ids_TK = self.gate(x.reshape(-1, D)).softmax(-1).topk(2)
        return x + Blockwise.mix(self, x, weights_TK, ids_TK)


class ExpertChoice(nn.Module):
    """Experts choose tokens: balanced by construction."""

    def __init__(self):
        super().__init__()
        self.num_experts, self.gate = E, nn.Linear(D, E)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x):
        x_TD = x.reshape(-1, D)
        values, tokens = self.gate(x_TD).softmax(-1).topk(2, dim=0)
        out = torch.zeros_like(x_TD)
        for number, expert in enumerate(self.experts):
            chosen = tokens[:, number]
            out = out.index_add(0, chosen, expert(x_TD[chosen]) * values[:, number, None])
        return out.view_as(x)


class Sampling(nn.Module):
    """Samples its experts: nothing that a bias could be added to is seen."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(D, E), nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x):
        scores_TE = self.gate(x.reshape(-1, D)).softmax(-1)
        ids = torch.multinomial(scores_TE, 2)
        return Blockwise.mix(self, x, scores_TE.gather(1, ids), ids)

    @property
    def specialists(self):
        return self.experts


class SparseAutoencoder(nn.Module):
    """Keeps the largest features, and has no experts."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(D, 32), nn.Linear(32, D)

    def forward(self, x):
        kept = self.encode(x).topk(4, dim=-1)
        return self.decode(torch.zeros(*x.shape[:-1], 32).scatter(-1, kept.indices, kept.values))


OWN_BIAS = (
    *(
        Blockwise,
        PositionalArguments,
        KeywordArguments,
        LiteralK,
        ByFunction,
        ByHelperObject,
        Sorting,
        ArgSorting,
    ),
    *(Top1ByMax, Top1ByArgmaxAndOneHot, Top1ByArgmaxAndMax, GroupsByZeros, GroupsByInfinity, StackedWeights),
    *(LinearBias, LoopingExperts, Scaled, Layer),
)
HOST_BIAS = {
    SeparateRouter: "nudge",
    OddlyNamedBias: "zeta",
    BiasInChild: "amount",
    LoopingWithBias: "gate_bias",
}
