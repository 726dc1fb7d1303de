"""ColossalAI, for OpenMoE: routers that are given logits, and hand their losses to a global object.

With ``use_norm`` the router ranks its experts once before it selects, only for the sum of the two largest.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from tests.strangers.slow import first_come, in_rounds, mix
from tests.strangers.stranger import D, E, Stranger, random_


class MoeManager:
    def __init__(self):
        self.router_aux_loss, self.router_z_loss = [], []


MOE_MANAGER = MoeManager()


class Top2Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.k_value, self.capacity_factor_train, self.min_capacity = 2, 1.25, 4
        self._aux_loss = self._z_loss = None

    def get_capacity(self, shape):
        capacity = math.floor(self.k_value * self.capacity_factor_train * shape[-2] / shape[-1])
        return max(capacity + capacity % 2, self.min_capacity)

    def set_losses(self, probs, expert_indices, logits):
        assert self._aux_loss is None
        used = functional.one_hot(expert_indices, E).max(dim=-2)[0].float().mean(dim=-2)
        self._aux_loss = E**2 * torch.mean(used * torch.mean(probs.float(), dim=-2))
        self._z_loss = torch.sum(torch.logsumexp(logits, dim=-1) ** 2) / len(logits)
        MOE_MANAGER.router_aux_loss.append(self._aux_loss)
        MOE_MANAGER.router_z_loss.append(self._z_loss)
        self._aux_loss = self._z_loss = None

    def forward(self, inputs, use_norm):
        assert inputs.dtype == torch.float
        probs = functional.softmax(inputs, dim=-1)
        if use_norm:
            routing_weights, _ = torch.topk(probs, 2, dim=-1)
            probs = probs / routing_weights.sum(dim=-1, keepdim=True)
        capacity = self.get_capacity(inputs.shape)
        top1_idx = torch.argmax(probs, dim=-1)
        mask1 = functional.one_hot(top1_idx, num_classes=E).to(torch.int32)
        top2_idx = torch.argmax(probs.masked_fill(mask1.bool(), float("-inf")), dim=-1)
        mask2 = functional.one_hot(top2_idx, num_classes=E).to(torch.int32)
        self.set_losses(probs, torch.stack([top1_idx, top2_idx], dim=-1), inputs)
        rank1, rank2 = torch.cumsum(mask1, dim=0) - 1, torch.cumsum(mask2, dim=0) - 1
        rank2 += torch.sum(mask1, dim=-2, keepdim=True)
        mask1 *= torch.lt(rank1, capacity)
        mask2 *= torch.lt(rank2, capacity)
        rank1, rank2 = torch.sum(mask1 * rank1, dim=-1), torch.sum(mask2 * rank2, dim=-1)
        weight1, weight2 = mask1 * probs, mask2 * probs
        cb_weight = torch.zeros((*inputs.shape, capacity))
        sec_mask = torch.zeros_like(cb_weight, dtype=torch.bool)
        rows = torch.arange(0, inputs.shape[0])
        for ids, rank, weight, mask in ((top1_idx, rank1, weight1, mask1), (top2_idx, rank2, weight2, mask2)):
            cb_weight[rows, ids, rank] += weight[rows, ids]
            sec_mask[rows, ids, rank] |= mask.bool()[rows, ids]
        return mask1.sum(dim=0) + mask2.sum(dim=0), cb_weight, sec_mask


class MLPExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.wi, self.wo = nn.Parameter(torch.empty(E, D, D)), nn.Parameter(torch.empty(E, D, D))

    def forward(self, x):
        hidden = [functional.relu(torch.mm(x[i], self.wi[i])) for i in range(len(x))]
        return torch.stack([torch.mm(hidden[i], self.wo[i]) for i in range(len(x))])


class SparseMLP(nn.Module):
    def __init__(self, router_norm):
        super().__init__()
        self.num_experts, self.topk, self.router_norm = E, 2, router_norm
        self.router = Top2Router()
        self.gate_weight = nn.Parameter(torch.empty(E, D))
        self.experts = MLPExperts()

    def forward(self, inputs):
        tokens = inputs.reshape(-1, D)
        gate_output = functional.linear(tokens, self.gate_weight).to(torch.float)
        _, weights, mask = self.router(inputs=gate_output, use_norm=self.router_norm)
        output = self.experts(torch.matmul(mask.type_as(inputs).permute(1, 2, 0), tokens))
        combined = torch.matmul(weights.type_as(inputs).view(len(tokens), -1), output.view(-1, D))
        return combined.reshape(inputs.shape)


def reference(block, x, bias_E):
    x_TD = x.reshape(-1, D)
    scores_TE = (x_TD @ block.gate_weight.T).float().softmax(-1)
    if block.router_norm:
        scores_TE = scores_TE / scores_TE.sort(descending=True).values[:, :2].sum(1, keepdim=True)
    ids_TK = in_rounds(scores_TE + bias_E, scores_TE + bias_E)
    capacity = 2 * 5 * len(x_TD) // (4 * E)
    weights_TK = scores_TE.gather(1, ids_TK) * first_come(ids_TK, capacity + capacity % 2)

    def expert(e, x):
        return functional.relu(x @ block.experts.wi[e]) @ block.experts.wo[e]

    return ids_TK, mix(x_TD, ids_TK, weights_TK, expert).view_as(x)


_shape = partial(
    Stranger,
    "hpcaitech/ColossalAI",
    "0a3aae509b7aac101e1a9e137c52527707bcdbff",
    "colossalai/moe/routers.py",
    reference=reference,
    router="router",
    shared=(MOE_MANAGER,),
)
BLOCKS = {
    "ColossalAI Top2Router": _shape(build=lambda: random_(SparseMLP(router_norm=False))),
    "ColossalAI Top2Router, normalised": _shape(build=lambda: random_(SparseMLP(router_norm=True))),
}
