"""Routers as they are written in public code: Shazeer, GShard, Switch, Megatron, Tutel, makeMoE and many by hand.

The library knows none of them. These differ in how they choose; `wild_calls` varies how the call is written,
`wild_places` where experts and router are, `wild_inputs` what the router receives, and `wild_biases` the tensors with
one entry per expert.

Shape legend: T tokens, D model width, E experts, K experts selected per token.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from tests.attach.discovery.wild_block import E, OfLogits, Wild


class OneMoreCandidate(OfLogits):
    """Shazeer's noisy gating: k + 1 are ranked, since the loss needs the threshold, and k used."""

    def gates(self, scores_TE):
        values, ids = scores_TE.topk(min(self.k + 1, E), dim=1)
        self.load = torch.where(scores_TE > values[:, self.k, None], 1.0, 0.0).sum(0)
        return torch.zeros_like(scores_TE).scatter(1, ids[:, : self.k], values[:, : self.k].softmax(1))


class ScatteredInfinity(OfLogits):
    """makeMoE: all but the selected logits are -inf, then one softmax over all experts."""

    def gates(self, scores_TE):
        values, ids = scores_TE.topk(self.k, dim=-1)
        return torch.full_like(scores_TE, float("-inf")).scatter(-1, ids, values).softmax(-1)


class FirstColumns(OfLogits):
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


class FirstOfSorted(Wild):
    def gates(self, scores_TE):
        values, order = scores_TE.sort(dim=-1, descending=True)
        return torch.zeros_like(scores_TE).scatter(1, order[:, : self.k], values[:, : self.k])


class FirstOfArgsort(Wild):
    def choose(self, scores_TE):
        return torch.argsort(scores_TE, dim=-1, descending=True)[..., : self.k]


class LastOfArgsort(Wild):
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


class TopOneByMax(Wild):
    k = 1

    def gates(self, scores_TE):
        weights_T1, ids_T1 = torch.max(scores_TE, dim=-1, keepdim=True)
        return torch.zeros_like(scores_TE).scatter(1, ids_T1, weights_T1)


class TopOneByArgmax(Wild):
    k = 1

    def gates(self, scores_TE):
        return scores_TE * functional.one_hot(scores_TE.argmax(-1), E)


class TopOneByArgmaxAndMax(Wild):
    """Weights are the largest scores, asked for once more."""

    k = 1

    def gates(self, scores_TE):
        ids_T, weights_T = torch.argmax(scores_TE, dim=-1), scores_TE.max(dim=-1).values
        return torch.zeros_like(scores_TE).scatter(1, ids_T[:, None], weights_T[:, None])


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


class GroupsByZeros(Wild):
    """DeepSeek-V2: of two groups, the one with the best expert is open; scores of the other are zero."""

    has_groups = True

    def worth(self, group_TE):
        return group_TE.amax(-1)

    def ranked(self, scores_TE, bias_E):
        """Rank the experts of the open group, which the bias does not choose."""
        one_TE, other_TE = scores_TE.split(E // 2, dim=1)
        is_one_T1 = (self.worth(one_TE) > self.worth(other_TE)).unsqueeze(1)
        is_open_TE = torch.cat([is_one_T1.expand_as(one_TE), ~is_one_T1.expand_as(other_TE)], dim=1)
        return (scores_TE + bias_E).where(is_open_TE, -torch.inf)

    def gates(self, scores_TE):
        best = scores_TE.view(-1, 2, E // 2).max(-1).values.topk(1, dim=-1).indices
        values, ids = scores_TE.masked_fill(~self.opened(best), 0.0).topk(self.k)
        return torch.zeros_like(scores_TE).scatter(1, ids, values)

    def opened(self, best_T1):
        return torch.zeros(len(best_T1), 2).scatter(1, best_T1, 1).repeat_interleave(E // 2, 1).bool()


class GroupsByInfinity(GroupsByZeros):
    """DeepSeek-V3: a group is worth its two best experts; scores of the other group are -inf."""

    def worth(self, group_TE):
        return group_TE.sum(-1) - group_TE.amin(-1)  # of three experts

    def gates(self, scores_TE):
        best = scores_TE.view(-1, 2, E // 2).topk(2, dim=-1).values.sum(-1).topk(1, dim=-1).indices
        ids_TK = scores_TE.masked_fill(~self.opened(best), float("-inf")).topk(self.k).indices
        return torch.zeros_like(scores_TE).scatter(1, ids_TK, scores_TE.gather(1, ids_TK))


class Transposed(Wild):
    """Experts first: (E, T)."""

    def choose(self, scores_TE):
        return scores_TE.t().contiguous().topk(self.k, dim=0)[1].t()


class CheckedFirst(Wild):
    """Looks at its data before it chooses."""

    def choose(self, scores_TE):
        if not torch.isfinite(scores_TE).all():
            scores_TE = scores_TE.nan_to_num()
        if scores_TE.isnan().any():
            raise ValueError("NaN in the router")
        return super().choose(scores_TE)


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


class Straight(Wild):
    """A hard mask with the gradient of the scores."""

    def gates(self, scores_TE):
        hard_TE = torch.zeros_like(scores_TE).scatter_(1, self.choose(scores_TE), 1.0)
        return hard_TE + scores_TE - scores_TE.detach()

    def weigh(self, scores_TE, ids_TK):
        return torch.ones_like(scores_TE.gather(1, ids_TK))
