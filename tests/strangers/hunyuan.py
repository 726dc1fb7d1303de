"""Tencent Hunyuan-Large: a gate that ranks once more what it selected, if dropped tokens go to random experts."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from tests.strangers.slow import best, mix, normalised, of
from tests.strangers.stranger import D, E, Stranger


def topkgating(logits, topk):
    gates = functional.softmax(logits.float(), dim=1)
    capacity = topk * gates.shape[0]
    _, expert_index = torch.topk(gates, topk)
    expert_mask = functional.one_hot(expert_index, E)
    used = torch.mean(expert_mask.max(dim=-2)[0].float(), dim=-2)
    l_aux = E**2 * torch.mean(used * torch.mean(gates, dim=-2))
    sums = torch.matmul(expert_mask.float(), gates.unsqueeze(-1)).sum(dim=1)
    router_probs = gates / torch.clamp(sums, min=torch.finfo(gates.dtype).eps)
    expert_mask = functional.one_hot(torch.transpose(expert_index, 0, 1).reshape(-1), E).to(torch.int32)
    exp_counts = torch.sum(expert_mask, dim=0).detach()
    priority = torch.cumsum(expert_mask, dim=0) * expert_mask - 1
    priority = torch.max(torch.transpose(priority.reshape((topk, -1, E)), 0, 1), dim=1)[0]
    valid = torch.logical_and(priority >= 0, priority < capacity)
    dispatch = functional.one_hot(torch.masked_fill(priority, ~valid, 0).long(), capacity).to(torch.bool)
    dispatch = torch.masked_fill(dispatch, ~valid.unsqueeze(-1).expand(-1, -1, capacity), 0)
    return l_aux, torch.einsum("te,tec->tec", router_probs, dispatch.float()), dispatch, exp_counts


def top1gating(logits, random_routing_dropped_token):
    gates = functional.softmax(logits.float(), dim=1)
    capacity = gates.shape[0]
    indices1_s = torch.argmax(gates, dim=1)
    mask1 = functional.one_hot(indices1_s, num_classes=E)
    exp_counts = torch.sum(mask1, dim=0).detach()
    l_aux = torch.sum(torch.mean(gates, dim=0) * torch.mean(mask1.float(), dim=0)) * E
    top_idx = torch.topk(mask1, k=capacity, dim=0)[1]
    mask1 = mask1 * torch.zeros_like(mask1).scatter_(0, top_idx, 1)
    if random_routing_dropped_token:
        sorted_notfull, indices_notfull = torch.sort(capacity - mask1.sum(dim=0), descending=True)
        free = torch.repeat_interleave(indices_notfull, sorted_notfull.to(torch.int64))
        free = free[torch.randperm(free.shape[0])]
        after_drop = torch.argmax(mask1, dim=1)
        drop_mask = (1 - mask1.sum(dim=1)).bool()
        drop_idx = drop_mask.nonzero().view(-1)
        after_drop.scatter_(0, drop_idx, free[: drop_mask.sum().to(torch.int64)])
        mask1 = functional.one_hot(after_drop, num_classes=E)
    locations1_s = torch.sum((torch.cumsum(mask1, dim=0) - 1) * mask1, dim=1)
    where = functional.one_hot(locations1_s, num_classes=capacity).float()
    combine = torch.einsum("se,sc->sec", gates * mask1.float(), where)
    return l_aux, combine, combine.bool(), exp_counts


class HunYuanTopKGate(nn.Module):
    def __init__(self, moe_topk, random_routing):
        super().__init__()
        self.moe_topk, self.drop_tokens, self.min_capacity = moe_topk, True, 8
        self.random_routing_dropped_token = random_routing
        self.wg = nn.Linear(D, E, bias=False, dtype=torch.float32)

    def forward(self, hidden_states):
        hidden_states = hidden_states.reshape(-1, D)
        if self.wg.weight.dtype == torch.float32:
            hidden_states = hidden_states.float()
        logits = self.wg(hidden_states)
        if self.moe_topk == 1:
            return top1gating(logits, self.random_routing_dropped_token)
        return topkgating(logits, self.moe_topk)


class HunYuanMoE(nn.Module):
    def __init__(self, moe_topk, random_routing=False):
        super().__init__()
        self.moe_topk, self.num_experts = moe_topk, E
        self.shared_mlp = nn.Linear(D, D)
        self.gate = HunYuanTopKGate(moe_topk, random_routing)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x):
        shared = self.shared_mlp(x)
        _, combine, dispatch, _ = self.gate(x)
        dispatched = torch.einsum("sec,sm->ecm", dispatch.type_as(x), x.reshape(-1, D))
        chunks = dispatched.chunk(self.num_experts, dim=0)
        output = torch.cat([expert(chunk) for chunk, expert in zip(chunks, self.experts, strict=True)])
        return shared + torch.einsum("sec,ecm->sm", combine.type_as(x), output).reshape(x.shape)


def reference(block, x, bias_E):
    x_TD, k = x.reshape(-1, D), block.moe_topk
    scores_TE = block.gate.wg(x_TD.to(block.gate.wg.weight.dtype)).float().softmax(1)
    ids_TK = best(scores_TE + bias_E, k)
    weights_TK = scores_TE.gather(1, ids_TK)
    routed_TD = mix(x_TD, ids_TK, normalised(weights_TK) if k > 1 else weights_TK, of(block.experts))
    return ids_TK, (routed_TD + block.shared_mlp(x_TD)).view_as(x)


_shape = partial(
    Stranger,
    "Tencent/Tencent-Hunyuan-Large",
    "cdc37358aa7ce74f4883ae639726804a63ea99f6",
    "models/modeling_hunyuan.py",
    reference=reference,
    router="gate",
)
BLOCKS = {
    "HunYuanTopKGate, k=1": _shape(build=partial(HunYuanMoE, 1), top_k=1),
    "HunYuanTopKGate, k=1, random routing": _shape(build=partial(HunYuanMoE, 1, True), top_k=1),
    "HunYuanTopKGate, k=2": _shape(build=partial(HunYuanMoE, 2)),
}
