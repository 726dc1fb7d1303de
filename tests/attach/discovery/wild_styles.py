"""Routers as they are written in public code: Shazeer, GShard, Switch, Megatron, Tutel, makeMoE and many by hand.

This file holds those that differ in how they choose, `wild_places` those that differ in where things are. Each says by
`scores` and `weigh` what it computes, from which `reference` computes it once more and plainly, and in its `forward`
routes in the way it stands for. Shape legend: B batch, S sequence, T tokens, D model width, E experts, K experts
selected per token.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import nn
from torch.nn import functional

D, E, K = 12, 6, 2


class Wild(nn.Module):
    """The plainest block of all; subclasses differ in one thing."""

    k = K
    rows = "tokens"
    """What one choice is made for: each token, or each sequence or image."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.ffns = self.make_experts()

    def also(self, x):
        """What the model gives the block besides the hidden states."""
        return ()

    def make_experts(self):
        return nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def outputs(self, x_TD):
        """All experts' outputs (T, E, D)."""
        return torch.stack([ffn(x_TD) for ffn in self.ffns], dim=1)

    def scores(self, x_TD):
        return self.gate(x_TD).softmax(-1)

    def weigh(self, scores_TE, ids_TK):
        return scores_TE.gather(1, ids_TK)

    def combine(self, x_TD, gates_TE):
        return (gates_TE.unsqueeze(-1) * self.outputs(x_TD)).sum(1)

    def reference(self, x, bias_E):
        """The output for this bias, computed plainly."""
        x_TD = x.reshape(-1, D)
        scores_TE = self.scores(x_TD)
        ids_TK = (scores_TE + bias_E).sort(descending=True, stable=True).indices[:, : self.k]
        gates_TE = torch.zeros_like(scores_TE).scatter(1, ids_TK, self.weigh(scores_TE, ids_TK))
        return self.combine(x_TD, gates_TE).view_as(x)

    def forward(self, x):
        x_TD = x.reshape(-1, D)
        return self.combine(x_TD, self.gates(self.scores(x_TD))).view_as(x)

    def gates(self, scores_TE):
        """Gate weights (T, E), zero for experts that are not selected."""
        ids_TK = self.choose(scores_TE)
        return torch.zeros_like(scores_TE).scatter(1, ids_TK, self.weigh(scores_TE, ids_TK))

    def choose(self, scores_TE):
        return scores_TE.topk(self.k).indices


# How the choice is made.


class OneMoreCandidate(Wild):
    """Shazeer's noisy gating: k + 1 are ranked, since the loss needs the threshold, and k used."""

    def scores(self, x_TD):
        return self.gate(x_TD)

    def weigh(self, scores_TE, ids_TK):
        return scores_TE.gather(1, ids_TK).softmax(-1)

    def gates(self, scores_TE):
        values, ids = scores_TE.topk(min(self.k + 1, E), dim=1)
        self.load = torch.where(scores_TE > values[:, self.k, None], 1.0, 0.0).sum(0)
        return torch.zeros_like(scores_TE).scatter(1, ids[:, : self.k], values[:, : self.k].softmax(1))


class ScatteredInfinity(OneMoreCandidate):
    """makeMoE: all but the selected logits are -inf, then one softmax over all experts."""

    def gates(self, scores_TE):
        values, ids = scores_TE.topk(self.k, dim=-1)
        return torch.full_like(scores_TE, float("-inf")).scatter(-1, ids, values).softmax(-1)


class FirstColumns(OneMoreCandidate):
    """All are ranked by topk, the first k used one by one."""

    def gates(self, scores_TE):
        values, ids = torch.topk(scores_TE, E, dim=-1)
        weights_TK, gates_TE = values[:, : self.k].softmax(-1), torch.zeros_like(scores_TE)
        for rank in range(self.k):
            gates_TE = gates_TE.scatter(1, ids[:, rank, None], weights_TK[:, rank, None])
        return gates_TE


class RankedOneByOne(Wild):
    """A sort whose columns are used in a loop."""

    def gates(self, scores_TE):
        order, gates_TE = scores_TE.argsort(dim=1, descending=True), torch.zeros_like(scores_TE)
        for rank in range(self.k):
            hot_TE = functional.one_hot(order[:, rank], E)
            gates_TE = gates_TE + scores_TE * hot_TE
        return gates_TE


class LastOfAscending(Wild):
    def choose(self, scores_TE):
        return torch.argsort(scores_TE, dim=-1)[:, -self.k :]


class LastOfSorted(Wild):
    def gates(self, scores_TE):
        values, order = torch.sort(scores_TE)
        return torch.zeros_like(scores_TE).scatter(1, order[..., -self.k :], values[..., -self.k :])


class NegatedArgsort(Wild):
    def choose(self, scores_TE):
        return (-scores_TE).argsort(dim=-1)[:, : self.k]


class SmallestDistance(Wild):
    """The nearest centroids: the score is the negative distance."""

    def scores(self, x_TD):
        return -torch.cdist(x_TD, self.gate.weight)

    def choose(self, scores_TE):
        return torch.topk(-scores_TE, self.k, largest=False).indices


class NearestCentroid(SmallestDistance):
    k = 1

    def choose(self, scores_TE):
        return (-scores_TE).argmin(-1, keepdim=True)


class TwoArgmaxes(Wild):
    """GShard: the second choice among what the first has left; capacity and dispatch by einsum."""

    def scores(self, x_TD):
        return self.gate(x_TD)

    def weigh(self, scores_TE, ids_TK):
        chosen_TK = scores_TE.softmax(-1).gather(1, ids_TK)
        return chosen_TK / chosen_TK.sum(-1, keepdim=True)

    def gates(self, scores_TE):
        first_TE = functional.one_hot(scores_TE.argmax(dim=1), E)
        second_TE = functional.one_hot(scores_TE.masked_fill(first_TE.bool(), -torch.inf).argmax(dim=1), E)
        chosen_TE = scores_TE.softmax(-1) * (first_TE + second_TE)
        return chosen_TE / chosen_TE.sum(-1, keepdim=True)

    def combine(self, x_TD, gates_TE):
        mask_TE = (gates_TE > 0).long()
        places_TEC = functional.one_hot((mask_TE.cumsum(0) - 1).clamp(min=0), len(x_TD)) * mask_TE[..., None]
        tokens_ECD = torch.einsum("tec,td->ecd", places_TEC.to(x_TD), x_TD)
        outputs_ECD = torch.stack(
            [ffn(tokens_CD) for ffn, tokens_CD in zip(self.ffns, tokens_ECD, strict=True)]
        )
        return torch.einsum("tec,ecd->td", gates_TE[..., None] * places_TEC, outputs_ECD)


class TwoTopOnes(Wild):
    """The same by topk of one, the first choice struck out by a product with its mask."""

    def gates(self, scores_TE):
        gate_1, index_1 = self.best(scores_TE)
        mask_1 = functional.one_hot(index_1, E).float()
        gate_2, index_2 = self.best(scores_TE * (1 - mask_1))
        mask_2 = functional.one_hot(index_2, E).float()
        return gate_1[:, None] * mask_1 + gate_2[:, None] * mask_2

    def best(self, scores_TE):
        values, index = scores_TE.topk(k=1, dim=-1)
        return values.squeeze(-1), index.squeeze(-1)


class Transposed(Wild):
    """Experts first: (E, T)."""

    def choose(self, scores_TE):
        return scores_TE.t().contiguous().topk(self.k, dim=0)[1].t()


class ByOverload(Wild):
    def choose(self, scores_TE):
        return torch.ops.aten.topk.default(scores_TE, self.k)[1]


class ByPartial(Wild):
    """No selecting name in any code of the block."""

    top = functools.partial(torch.topk, k=K, dim=-1)

    def choose(self, scores_TE):
        return self.top(scores_TE)[1]


class CheckedFirst(Wild):
    """Looks at its data before it chooses."""

    def choose(self, scores_TE):
        if not torch.isfinite(scores_TE).all():
            scores_TE = scores_TE.nan_to_num()
        if scores_TE.isnan().any():
            raise ValueError("NaN in the router")
        return super().choose(scores_TE)


class NumpyK(Wild):
    """k comes from numpy."""

    def choose(self, scores_TE):
        return scores_TE.topk(np.int64(self.k)).indices


class PerSequence(Wild):
    """Routes one sequence of the batch after the other."""

    def forward(self, x):
        return torch.stack([super(PerSequence, self).forward(x_SD) for x_SD in x])


class InChunks(Wild):
    def forward(self, x):
        chunks = x.reshape(-1, D).split(8)
        return torch.cat([super(InChunks, self).forward(x_TD) for x_TD in chunks]).view_as(x)


class AuxiliaryTopk(Wild):
    """Ranks the same scores once more for a loss."""

    def choose(self, scores_TE):
        ids_TK = super().choose(scores_TE)
        self.fraction = functional.one_hot(scores_TE.topk(self.k).indices, E).float().mean((0, 1))
        return ids_TK


class WithSharedExperts(Wild):
    """Ids of experts that always run are appended to the selected ones."""

    def gates(self, scores_TE):
        values, ids = scores_TE.topk(self.k)
        ids = torch.cat([ids, torch.full_like(ids[:, :1], E)], dim=1)
        values = torch.cat([values, torch.ones_like(values[:, :1])], dim=1)
        return torch.zeros(len(ids), E + 1).scatter(1, ids, values)[:, :E]


class UnderAutocast(Wild):
    def choose(self, scores_TE):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=False):
            return super().choose(scores_TE.float())


class Straight(Wild):
    """A hard mask with the gradient of the scores."""

    def gates(self, scores_TE):
        hard_TE = torch.zeros_like(scores_TE).scatter_(1, self.choose(scores_TE), 1.0)
        return hard_TE + scores_TE - scores_TE.detach()

    def weigh(self, scores_TE, ids_TK):
        return torch.ones_like(scores_TE.gather(1, ids_TK))
