"""lucidrains/mixture-of-experts: two rounds of top-1; the second expert is used at random below a threshold.

Shape legend: B batch, S sequence, E experts, K experts selected per token, C places of an expert.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from tests.strangers.slow import first_come, in_rounds, mix
from tests.strangers.stranger import B, D, E, S, Stranger, random_


def top1(t):
    values, index = t.topk(k=1, dim=-1)
    return values.squeeze(dim=-1), index.squeeze(dim=-1)


def cumsum_exclusive(t):
    return torch.cumsum(t, dim=-2) - t


class Top2Gating(nn.Module):
    def __init__(self, second_policy_train):
        super().__init__()
        self.eps, self.num_gates = 1e-9, E
        self.w_gating = nn.Parameter(torch.randn(D, E))
        self.second_policy_train, self.second_threshold_train = second_policy_train, 0.2
        self.capacity_factor_train = 1.25

    def forward(self, x):
        group_size, threshold = x.shape[-2], self.second_threshold_train
        raw_gates = torch.einsum("...bnd,...de->...bne", x, self.w_gating).softmax(dim=-1)
        gate_1, index_1 = top1(raw_gates)
        mask_1 = functional.one_hot(index_1, self.num_gates).float()
        gate_2, index_2 = top1(raw_gates * (1.0 - mask_1))
        mask_2 = functional.one_hot(index_2, self.num_gates).float()
        denom = gate_1 + gate_2 + self.eps
        gate_1 /= denom
        gate_2 /= denom
        loss = (raw_gates.mean(dim=-2) * mask_1.mean(dim=-2)).mean() * float(self.num_gates**2)
        if self.second_policy_train == "random":
            probs = torch.zeros_like(gate_2).uniform_(0.0, 1.0)
            mask_2 *= (probs < (gate_2 / max(threshold, self.eps))).float().unsqueeze(-1)
        elif self.second_policy_train == "threshold":
            mask_2 *= (gate_2 > threshold).float().unsqueeze(-1)
        capacity = max(min(group_size, int(group_size * self.capacity_factor_train / self.num_gates)), 4)
        position_1 = cumsum_exclusive(mask_1) * mask_1
        mask_1 *= (position_1 < float(capacity)).float()
        gate_1 = gate_1 * mask_1.sum(dim=-1)
        position_2 = (cumsum_exclusive(mask_2) + mask_1.sum(dim=-2, keepdim=True)) * mask_2
        mask_2 *= (position_2 < float(capacity)).float()
        gate_2 = gate_2 * mask_2.sum(dim=-1)
        combine = 0.0
        for gate, index, position in ((gate_1, index_1, position_1), (gate_2, index_2, position_2)):
            where = functional.one_hot(position.sum(dim=-1).long(), 2 * S)[..., :capacity]
            expert = functional.one_hot(index, self.num_gates)
            combine = combine + gate[..., None, None] * expert[..., None] * where[..., None, :]
        return combine.bool().to(combine), combine, loss


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.zeros(E, D, D)), nn.Parameter(torch.zeros(E, D, D))

    def forward(self, x):
        return torch.einsum(
            "end,edh->enh", functional.relu(torch.einsum("end,edh->enh", x, self.w1)), self.w2
        )


class MoE(nn.Module):
    def __init__(self, second_policy_train):
        super().__init__()
        self.num_experts, self.loss_coef = E, 1e-2
        self.gate, self.experts = Top2Gating(second_policy_train), Experts()

    def forward(self, inputs):
        dispatch, combine, loss = self.gate(inputs)
        placed = torch.einsum("bnd,bnec->ebcd", inputs, dispatch)
        outputs = self.experts(placed.reshape(E, -1, D)).reshape(placed.shape)
        return torch.einsum("ebcd,bnec->bnd", outputs, combine), loss * self.loss_coef


def reference(block, x, bias_E):
    x_TD, policy = x.reshape(-1, D), block.gate.second_policy_train
    scores_TE = (x_TD @ block.gate.w_gating).softmax(-1)
    ids_TK = in_rounds(scores_TE + bias_E, scores_TE + bias_E)
    weights_TK = scores_TE.gather(1, ids_TK)
    weights_TK = weights_TK / (weights_TK.sum(1, keepdim=True) + 1e-9)
    wanted_TK = torch.ones_like(ids_TK, dtype=torch.bool)
    wanted_TK[:, 1] = weights_TK[:, 1] > 0.2
    if policy == "random":
        wanted_TK[:, 1] = torch.rand(B, S).flatten() < weights_TK[:, 1] / 0.2
    kept_BSK = [
        first_come(ids_SK, 4, wanted_TK=wanted_SK, dropped_take_room=False)
        for ids_SK, wanted_SK in zip(ids_TK.split(S), wanted_TK.split(S), strict=True)
    ]

    def expert(e, x):
        return functional.relu(x @ block.experts.w1[e]) @ block.experts.w2[e]

    return ids_TK, mix(x_TD, ids_TK, weights_TK * torch.cat(kept_BSK), expert).view_as(x)


_shape = partial(
    Stranger,
    "lucidrains/mixture-of-experts",
    "0fb459faf558c8e77b0e018685c64d00571d4fd9",
    "mixture_of_experts/mixture_of_experts.py",
    reference=reference,
    router="gate",
)
BLOCKS = {
    "mixture-of-experts Top2Gating, random": _shape(build=lambda: random_(MoE("random"))),
    "mixture-of-experts Top2Gating, threshold": _shape(build=lambda: random_(MoE("threshold"))),
}
