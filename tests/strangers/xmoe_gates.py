"""torchscale: gates of X-MoE and GShard, which log a histogram, and cache a generator in a global map.

Shape legend: T tokens, E experts, C places of an expert.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from tests.strangers.gumbel import gumbel_rsample
from tests.strangers.stranger import D, E


def one_hot(indices, num_classes):
    output = torch.zeros((*indices.shape[:-1], num_classes), dtype=indices.dtype)
    return output.scatter_(-1, indices, 1)


def fused_cumsum_sub_one(mask):
    return torch.cumsum(mask, dim=0) - 1


def histogram(indices, num_tokens):
    """Return the percentage of tokens of each expert, in order, as the gates log it."""
    hist = 100 * torch.histc(indices.squeeze().float() + 1, bins=E, min=1, max=E) / num_tokens
    return torch.sort(hist, dim=0, descending=True).values + torch.finfo(torch.float32).tiny


def places(gates_s, mask, locations_s, capacity):
    where = one_hot(locations_s.unsqueeze(-1), capacity).to(gates_s.dtype)
    return torch.bmm((gates_s.unsqueeze(-1) * mask.to(gates_s.dtype)).unsqueeze(-1), where.unsqueeze(1))


def top1gating(logits):
    gates = functional.softmax(logits, dim=1)
    capacity = math.ceil(len(gates) / E)
    indices1_s = torch.argmax(gates, dim=1)
    mask1 = one_hot(indices1_s.unsqueeze(-1), E)
    metadata = {"top": histogram(indices1_s, len(gates))[:2].sum()}
    gates1_s = (gates * mask1).sum(dim=1)
    locations1 = fused_cumsum_sub_one(mask1)
    l_aux = torch.mean(gates.mean(dim=0) * mask1.to(gates.dtype).mean(dim=0)) * E * E
    mask1 = mask1 * torch.lt(locations1, capacity)
    combine = places(gates1_s, mask1, torch.sum(locations1 * mask1, dim=1), capacity)
    return l_aux, combine, combine.bool(), metadata


def top2gating(logits, policy, prioritized):
    gates = functional.softmax(logits, dim=1)
    capacity = 2 * math.ceil(len(gates) / E)
    indices1_s = torch.argmax(gates, dim=1, keepdim=True)
    mask1 = one_hot(indices1_s, E)
    noisy = logits + gumbel_rsample(logits.shape, device=logits.device) if policy == "sampling" else logits
    indices2_s = torch.argmax(noisy.masked_fill(mask1.bool(), float("-inf")), dim=1, keepdim=True)
    mask2 = one_hot(indices2_s, E)
    if policy == "random":
        sampled = (2 * (gates * mask2).sum(dim=1)) > torch.rand(len(gates))
        mask2 = mask2 * sampled.repeat(E, 1).transpose(1, 0)
    if prioritized:
        importance = -1 * gates.max(dim=1)[0]
        order, back = importance.argsort(dim=0), importance.argsort(dim=0).argsort(dim=0)
        locations1 = (fused_cumsum_sub_one(mask1[order]) * mask1[order])[back]
        locations2 = (fused_cumsum_sub_one(mask2[order]) * mask2[order])[back]
    else:
        locations1, locations2 = fused_cumsum_sub_one(mask1), fused_cumsum_sub_one(mask2)
    locations2 = locations2 + torch.sum(mask1, dim=0, keepdim=True)
    l_aux = torch.mean(gates.mean(dim=0) * mask1.to(gates.dtype).mean(dim=0)) * E * E
    mask1 = mask1 * torch.lt(locations1, capacity)
    mask2 = mask2 * torch.lt(locations2, capacity)
    metadata = {"top": histogram(indices1_s, len(gates))[:2].sum() + histogram(indices2_s, len(gates))[0]}
    gates1_s, gates2_s = (gates * mask1).sum(dim=1), (gates * mask2).sum(dim=1)
    denom_s = torch.clamp(gates1_s + gates2_s, min=torch.finfo(gates.dtype).eps)
    combine = places(gates1_s / denom_s, mask1, torch.sum(locations1 * mask1, dim=1), capacity)
    combine = combine + places(gates2_s / denom_s, mask2, torch.sum(locations2 * mask2, dim=1), capacity)
    return l_aux, combine, combine.bool(), metadata


class Gate(nn.Module):
    """The logits of all gates: a linear layer, or cosines to weights that each forward normalises."""

    def __init__(self, use_xmoe):
        super().__init__()
        self.use_xmoe = use_xmoe
        if use_xmoe:
            self.wg_reduction = nn.Linear(D, 4, bias=False)
            self.wg = nn.Parameter(nn.init.orthogonal_(torch.empty(E, 4), gain=0.32))
        else:
            self.wg = nn.Linear(D, E, bias=False)

    def logits(self, x):
        if not self.use_xmoe:
            return self.wg(x)
        x = self.wg_reduction(x)
        with torch.no_grad():
            self.wg.mul_(1.5 / self.wg.norm(p=2.0, dim=1, keepdim=True))
        scores = x.float().matmul(
            functional.normalize(self.wg.float(), p=2.0, dim=1, eps=1e-4).transpose(0, 1)
        )
        scores = scores.type_as(x)
        finite = scores.isfinite()
        if not finite.all():
            scores[~finite] = scores[finite].min()
        return scores


class Top1Gate(Gate):
    def forward(self, x):
        return top1gating(self.logits(x))


class Top2Gate(Gate):
    def __init__(self, use_xmoe=False, second_expert_policy="sampling", batch_prioritized_routing=False):
        super().__init__(use_xmoe)
        self.second_expert_policy = second_expert_policy
        self.batch_prioritized_routing = batch_prioritized_routing

    def forward(self, x):
        return top2gating(self.logits(x), self.second_expert_policy, self.batch_prioritized_routing)
