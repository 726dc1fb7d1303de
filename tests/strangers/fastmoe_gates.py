"""FastMoE: its gates, which leave their loss on themselves; what it does on a GPU is plain code here."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from tests.strangers.stranger import D, E


def prune_gate_by_capacity(ids, capacity):
    """Return the ids with -1 where an expert already has as many tokens as it takes."""
    one_hot = functional.one_hot(ids.reshape(-1), E)
    place = ((one_hot.cumsum(0) - 1) * one_hot).sum(1)
    return torch.where(place < capacity, ids.reshape(-1), -1).view(ids.shape)


def share_of(ids):
    counted = torch.zeros(E).scatter_add(0, ids, torch.ones_like(ids, dtype=torch.float))
    return counted / len(ids)


class NaiveGate(nn.Module):
    def __init__(self, top_k=2):
        super().__init__()
        self.world_size, self.num_expert, self.tot_expert, self.loss = 1, E, E, None
        self.gate = nn.Linear(D, self.tot_expert)
        self.top_k = top_k

    def set_loss(self, loss):
        self.loss = loss

    def forward(self, inp, return_all_scores=False):
        gate = self.gate(inp)
        val, idx = torch.topk(gate, k=self.top_k, dim=-1, largest=True, sorted=False)
        score = functional.softmax(val.view(-1, self.top_k), dim=-1)
        self.set_loss(torch.zeros(1, requires_grad=True))
        return (idx, score, gate) if return_all_scores else (idx, score)


class GShardGate(NaiveGate):
    def __init__(self):
        super().__init__(top_k=2)
        self.capacity, self.random_routing = (1.2, 2.4), True

    def forward(self, x):
        topk_idx, topk_val, gate_score = super().forward(x, return_all_scores=True)
        top1_idx = topk_idx.view((-1, self.top_k))[:, 0]
        m_e = torch.mean(functional.softmax(gate_score, dim=1), dim=0)
        self.set_loss(torch.mean(share_of(top1_idx) * m_e) * self.num_expert**2)
        cap_rate = self.capacity[0 if self.training else 1]
        capacity = math.ceil(cap_rate * x.shape[0]) * self.top_k // self.num_expert
        topk_idx = prune_gate_by_capacity(topk_idx, capacity)
        if self.random_routing:
            mask = 2 * topk_val[:, 1] < torch.rand(gate_score.size(0))
            topk_idx[:, 1].masked_fill_(mask, -1)
        return topk_idx, topk_val


class SwitchGate(NaiveGate):
    def __init__(self):
        super().__init__(top_k=1)
        self.switch_eps, self.capacity = 0.1, (1.2, 2.4)

    def forward(self, inp):
        score = self.gate(inp)
        if self.training:
            noise = torch.rand_like(score)
            score += noise * 2 * self.switch_eps + 1.0 - self.switch_eps
        score = functional.softmax(score.float(), dim=-1)
        top1_score, top1_idx = torch.topk(score, k=1, dim=-1, largest=True)
        cap_rate = self.capacity[0 if self.training else 1]
        top1_idx = prune_gate_by_capacity(top1_idx, math.ceil(cap_rate * inp.shape[0] / self.num_expert))
        valid_idx = top1_idx[top1_idx > -1]
        prob_expert = score.sum(dim=0) / valid_idx.numel()
        self.set_loss((share_of(valid_idx) * prob_expert).sum() * self.tot_expert)
        return top1_idx, top1_score.to(inp.dtype)


class NoisyGate(NaiveGate):
    def __init__(self):
        super().__init__()
        del self.gate
        self.w_gate, self.w_noise = nn.Parameter(torch.randn(D, E)), nn.Parameter(torch.randn(D, E))

    def cv_squared(self, x):
        return x.float().var() / (x.float().mean() ** 2 + 1e-10)

    def _prob_in_top_k(self, clean, noisy, noise_stddev, noisy_top):
        positions = torch.arange(clean.size(0)) * noisy_top.size(1) + self.top_k
        if_in = noisy_top.flatten().gather(0, positions).unsqueeze(1)
        if_out = noisy_top.flatten().gather(0, positions - 1).unsqueeze(1)
        normal = torch.distributions.Normal(torch.tensor([0.0]), torch.tensor([1.0]))
        threshold = torch.where(torch.gt(noisy, if_in), if_in, if_out)
        return normal.cdf((clean - threshold) / noise_stddev)

    def forward(self, inp):
        clean = inp @ self.w_gate
        noise_stddev = (functional.softplus(inp @ self.w_noise) + 1e-2) * self.training
        noisy = clean + torch.randn_like(clean) * noise_stddev
        top_logits, top_indices = noisy.topk(min(self.top_k + 1, self.tot_expert), dim=1)
        ids, gates = top_indices[:, : self.top_k], functional.softmax(top_logits[:, : self.top_k], dim=1)
        importance = torch.zeros_like(noisy, requires_grad=True).scatter(1, ids, gates).sum(0)
        load = self._prob_in_top_k(clean, noisy, noise_stddev, top_logits).sum(0)
        self.set_loss(self.cv_squared(importance) + self.cv_squared(load))
        return ids.contiguous().view(-1), gates.contiguous().unsqueeze(1)


class FasterGate(NaiveGate):
    """Sends few tokens to experts of other nodes: those with the best first choice; others choose again at home."""

    def __init__(self, experts_per_node):
        super().__init__()
        self.ogn_ratio = 0.14
        self.mask = torch.arange(E) >= experts_per_node

    def forward(self, inp):
        gate_score = self.gate(inp)
        top2_val, top2_idx = torch.topk(gate_score, k=2, dim=-1)
        with torch.no_grad():
            top1_idx, top1_val = top2_idx.view((-1, 2))[:, 0], top2_val.view((-1, 2))[:, 0]
        m_e = torch.mean(functional.softmax(gate_score, dim=1), dim=0)
        self.set_loss(torch.mean(share_of(top1_idx) * m_e) * self.num_expert**2)
        with torch.no_grad():
            ogn_mask = self.mask[top1_idx]
            ogn_thres = int(inp.shape[0] * self.ogn_ratio)
        if ogn_mask.sum().item() < ogn_thres:
            topk_val, topk_idx = torch.topk(gate_score, k=self.top_k)
            return topk_idx, functional.softmax(topk_val, dim=-1)
        with torch.no_grad():
            top1_val[~ogn_mask] = float("-inf")
            _, top_ogn = torch.topk(top1_val.view(-1), k=ogn_thres)
            cand = gate_score.clone()
            cand[:, self.mask] = float("-inf")
            _, topk_idx = torch.topk(cand, k=self.top_k)
            topk_idx[top_ogn, 1] = top1_idx.view(-1)[top_ogn]
        rows = torch.arange(inp.shape[0]).repeat_interleave(2)
        topk_val = gate_score[rows, topk_idx.view(-1)].view(-1, self.top_k)
        return topk_idx, functional.softmax(topk_val, dim=-1)


class SwipeGate(NaiveGate):
    """Limits how many tokens a worker takes over all rounds; the rest go to an expert that the round names."""

    def swipe_once(self, idx, capacity, bias):
        with torch.no_grad():
            kept = torch.arange(len(idx)) < capacity
            return torch.where(kept, idx, bias), capacity - kept.sum()

    def forward(self, inp):
        score = self.gate(inp)
        orig_score, orig_idx = torch.topk(score, k=self.top_k, dim=-1)
        if not self.training:
            return orig_idx, functional.softmax(orig_score, dim=-1)
        capacity = torch.scalar_tensor(inp.shape[0] * self.top_k, dtype=torch.long)
        ids, values = [], []
        for k in range(self.top_k):
            idx, capacity = self.swipe_once(orig_idx[:, k], capacity, k % self.num_expert)
            values.append(score[torch.arange(inp.shape[0]), idx])
            ids.append(idx)
        values = torch.stack(values).transpose(0, 1)
        return torch.stack(ids).transpose(0, 1), functional.softmax(values, dim=-1)
