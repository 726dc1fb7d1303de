"""DeepSpeed: gates that choose tokens at random if an expert is full, with compiled functions and global generators."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tests.strangers.gumbel import gumbel_rsample
from tests.strangers.stranger import D, E

exp_selection_uniform_map: dict = {}
jit_script_compat = torch.compile(backend="eager")  # the package compiles these functions


@jit_script_compat
def _capacity(gates, capacity_factor, min_capacity):
    capacity = torch.ceil((gates.shape[0] / gates.shape[1]) * capacity_factor).to(torch.int64)
    if capacity < min_capacity:
        capacity = min_capacity.to(torch.int64)
    return capacity


@jit_script_compat
def _top_idx(source, k):
    return torch.topk(source, k=k, dim=0)[1]


def _uniform(shape, device):
    uniform = exp_selection_uniform_map.get(device)
    if uniform is None:
        low, high = torch.tensor(0.0, device=device), torch.tensor(1.0, device=device)
        uniform = torch.distributions.uniform.Uniform(low=low, high=high).rsample
        exp_selection_uniform_map[device] = uniform
    return uniform(shape)


def top1gating(logits, capacity_factor, min_capacity, noisy_gate_policy, drop_tokens, use_rts):
    if noisy_gate_policy == "RSample":
        logits_w_noise = logits + gumbel_rsample(logits.shape, device=logits.device)
    gates = functional.softmax(logits, dim=1)
    capacity = _capacity(gates, torch.tensor(capacity_factor), torch.tensor(min_capacity))
    indices1_s = torch.argmax(logits_w_noise if noisy_gate_policy == "RSample" else gates, dim=1)
    mask1 = functional.one_hot(indices1_s, num_classes=int(gates.shape[1]))
    exp_counts = torch.sum(mask1, dim=0).detach()
    if not drop_tokens:
        capacity = min(torch.max(exp_counts), torch.tensor(mask1.size(0)))
    l_aux = torch.sum(torch.mean(gates, dim=0) * torch.mean(mask1.float(), dim=0)) * gates.shape[1]
    mask1_rand = mask1 * _uniform(mask1.shape, logits.device) if use_rts else mask1
    top_idx = _top_idx(mask1_rand, capacity)
    mask1 = mask1 * torch.zeros_like(mask1).scatter_(0, top_idx, 1)
    locations1_s = torch.sum((torch.cumsum(mask1, dim=0) - 1) * mask1, dim=1)
    where = functional.one_hot(locations1_s, num_classes=int(capacity)).float()
    combine = torch.einsum("se,sc->sec", gates * mask1.float(), where)
    return l_aux, combine, combine.bool(), exp_counts


def top2gating(logits, capacity_factor, min_capacity):
    gates = functional.softmax(logits, dim=1)
    indices1_s = torch.argmax(gates, dim=1)
    mask1 = functional.one_hot(indices1_s, num_classes=E)
    logits += gumbel_rsample(logits.shape, device=logits.device)
    logits_except1 = logits.masked_fill(mask1.bool(), float("-inf"))
    mask2 = functional.one_hot(torch.argmax(logits_except1, dim=1), num_classes=E)
    locations1, locations2 = torch.cumsum(mask1, dim=0) - 1, torch.cumsum(mask2, dim=0) - 1
    locations2 += torch.sum(mask1, dim=0, keepdim=True)
    l_aux = torch.mean(torch.mean(gates, dim=0) * torch.mean(mask1.float(), dim=0)) * E * E
    exp_counts = torch.sum(mask1 + mask2, dim=0).detach()
    capacity = _capacity(gates, torch.tensor(capacity_factor * 2), torch.tensor(min_capacity))
    mask1 *= torch.lt(locations1, capacity)
    mask2 *= torch.lt(locations2, capacity)
    gates1_s = torch.einsum("se,se->s", gates, mask1.float())
    gates2_s = torch.einsum("se,se->s", gates, mask2.float())
    denom_s = torch.clamp(gates1_s + gates2_s, min=torch.finfo(gates1_s.dtype).eps)
    gates1_s /= denom_s
    gates2_s /= denom_s
    combine = 0
    for gates_s, mask, locations in ((gates1_s, mask1, locations1), (gates2_s, mask2, locations2)):
        where = functional.one_hot(torch.sum(locations * mask, dim=1), num_classes=int(capacity)).float()
        combine = combine + torch.einsum("s,se,sc->sec", gates_s, mask.float(), where)
    return l_aux, combine, combine.bool(), exp_counts


def topkgating(logits, k, capacity_factor, min_capacity):
    gates = functional.softmax(logits, dim=1)
    top_gate, top_idx = torch.topk(gates, k=k, dim=1)
    mask = torch.zeros_like(gates, dtype=torch.bool).scatter_(1, top_idx, 1)
    exp_counts = torch.sum(mask, dim=0).detach()
    l_aux = torch.mean(torch.mean(gates, dim=0) * torch.mean(mask.float(), dim=0)) * E * E / k
    capacity = _capacity(gates, torch.tensor(capacity_factor * k), torch.tensor(min_capacity))
    chosen = torch.zeros_like(gates).scatter(1, top_idx, top_gate)
    _, capacity_indices = torch.topk(
        chosen, k=min(capacity, torch.tensor(gates.size(0))), dim=0, sorted=False
    )
    mask &= torch.zeros_like(gates, dtype=torch.bool).scatter_(0, capacity_indices, True)
    locations = torch.cumsum(mask, dim=0) - 1
    gates_masked = gates * mask
    gates_s = torch.sum(gates_masked, dim=-1, keepdim=True)
    gates_masked = gates_masked / torch.clamp(gates_s, min=torch.finfo(gates_masked.dtype).eps)
    where = functional.one_hot(locations * mask, num_classes=int(capacity)).float()
    combine = torch.einsum("se,sec->sec", gates_masked, where)
    return l_aux, combine, combine.bool(), exp_counts


class TopKGate(nn.Module):
    def __init__(self, k, noisy_gate_policy=None, drop_tokens=True, use_rts=True):
        super().__init__()
        self.wg = nn.Linear(D, E, bias=False)
        self.k, self.capacity_factor, self.min_capacity = k, 1.0, 2
        self.noisy_gate_policy, self.drop_tokens, self.use_rts = noisy_gate_policy, drop_tokens, use_rts

    def forward(self, x):
        logits = functional.linear(x.float(), weight=self.wg.weight.float())
        if self.k == 1:
            policy = self.noisy_gate_policy if self.training else None
            return top1gating(
                logits, self.capacity_factor, self.min_capacity, policy, self.drop_tokens, self.use_rts
            )
        if self.k == 2:
            return top2gating(logits, self.capacity_factor, self.min_capacity)
        return topkgating(logits, self.k, self.capacity_factor, self.min_capacity)
