"""st-moe-pytorch: second experts are used at random if their weight is below a threshold; top-k may be differentiable.

Shape legend: B batch, S sequence, E experts, K experts selected per token, C places of an expert.
"""

from __future__ import annotations

from collections import namedtuple
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from tests.strangers.slow import best, first_come, mix, normalised, of
from tests.strangers.stranger import B, D, E, S, Stranger

TopkReturn = namedtuple("TopkReturn", ["values", "indices", "coor_descent_values"])


def coor_descent(scores, k, n_iters=20, eps=1e-1):
    """Return values from 0 to 1 with sum k, near 1 for the k largest."""
    b = -scores
    for _ in range(n_iters):
        a = eps * (torch.log(torch.tensor(k)) - ((scores + b) / eps).logsumexp(dim=-1, keepdim=True))
        b = -functional.relu(scores + a)
    return ((scores + a + b) / eps).exp()


def maybe_differentiable_topk(x, k, differentiable):
    if not differentiable:
        return TopkReturn(*torch.topk(x, k, dim=-1), None)
    descent = coor_descent(x, k=min(k * 9 / 8, x.shape[-1]))
    values, indices = torch.topk(x * (descent + (1 - descent).detach()), k, dim=-1)
    return TopkReturn(values, indices, descent.gather(-1, indices))


def cumsum_exclusive(t):
    return torch.cumsum(t, dim=-2) - t


class TopNGating(nn.Module):
    def __init__(self, differentiable_topk):
        super().__init__()
        self.eps, self.num_gates, self.top_n = 1e-9, E, 2
        self.to_gates = nn.Linear(D, E, bias=False)
        self.differentiable_topk = differentiable_topk
        self.topk = partial(maybe_differentiable_topk, differentiable=differentiable_topk)
        self.register_buffer("threshold_train", torch.tensor([self.eps, 0.2]))
        self.register_buffer("zero", torch.zeros((1,)), persistent=False)
        self.capacity_factor_train = 1.25

    def forward(self, x):
        capacity = max(min(x.shape[-2], int(x.shape[-2] * self.capacity_factor_train / self.num_gates)), 4)
        gate_logits = self.to_gates(x)
        raw_gates = gate_logits.softmax(dim=-1)
        found = self.topk(raw_gates, k=self.top_n)
        gates = (found.coor_descent_values if self.differentiable_topk else found.values).movedim(-1, 0)
        one_hot = functional.one_hot(found.indices.movedim(-1, 0), self.num_gates)
        mask = one_hot.float()
        mask_1 = mask[0]
        gates = gates / gates.sum(0, keepdim=True).clamp(min=self.eps)
        probs = torch.zeros_like(gates).uniform_(0.0, 1.0)
        should_route = probs < gates / self.threshold_train.clamp(min=self.eps)[:, None, None]
        should_route[0, ...] = True
        mask = mask * should_route.float().unsqueeze(-1)
        mask_cumsum, positions, kept, count = cumsum_exclusive(mask), [], [], 0.0
        for n in range(self.top_n):
            position = (mask_cumsum[n] + count) * mask[n]
            kept.append(mask[n] * (position < float(capacity)).float())
            count = kept[n].sum(-2, keepdim=True) + count
            positions.append(position.sum(-1))
        mask_flat = torch.stack(kept).sum(-1)
        gates = gates * mask_flat
        where = functional.one_hot(torch.stack(positions).long(), 2 * S)[..., :capacity]
        combine = torch.einsum("kbn,kbne,kbnc->bnec", gates * mask_flat, one_hot.float(), where.float())
        dispatch = combine.bool().type(x.dtype)
        dispatch = dispatch + combine - combine.detach()
        if not self.training:
            return dispatch, combine, self.zero, self.zero
        balance_loss = (raw_gates.mean(-2) * mask_1.mean(-2)).mean() * float(self.num_gates**2)
        return dispatch, combine, balance_loss, torch.square(torch.logsumexp(gate_logits, dim=-1)).mean()


class MoE(nn.Module):
    def __init__(self, differentiable_topk=False):
        super().__init__()
        self.dim, self.num_experts = D, E
        self.gate = TopNGating(differentiable_topk)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x):
        dispatch, combine, balance_loss, router_z_loss = self.gate(x)
        inputs = torch.einsum("bnd,bnec->becd", x, dispatch)
        outputs = torch.stack([expert(inputs[:, e]) for e, expert in enumerate(self.experts)], dim=1)
        output = torch.einsum("becd,bnec->bnd", outputs, combine.type_as(x))
        return output, balance_loss * 1e-2 + router_z_loss * 1e-3


def reference(block, x, bias_E):
    gate, x_TD = block.gate, x.reshape(-1, D)
    scores_TE = gate.to_gates(x_TD).softmax(-1)
    values_TE = coor_descent(scores_TE, 2 * 9 / 8) if gate.differentiable_topk else scores_TE
    ids_TK = best(scores_TE + bias_E, 2)
    weights_TK = normalised(values_TE.gather(1, ids_TK))
    lots_KBS = torch.rand(2, B, S)
    wanted_TK = weights_TK / 0.2 > lots_KBS.reshape(2, -1).T
    wanted_TK[:, 0] = True
    kept_BSK = [
        first_come(ids_SK, 4, wanted_TK=wanted_SK, dropped_take_room=False)
        for ids_SK, wanted_SK in zip(ids_TK.split(S), wanted_TK.split(S), strict=True)
    ]
    return ids_TK, mix(x_TD, ids_TK, weights_TK * torch.cat(kept_BSK), of(block.experts)).view_as(x)


_shape = partial(
    Stranger,
    "lucidrains/st-moe-pytorch",
    "d94e65d8a1f50eb5b41efa5317b0d1b17c9dbfad",
    "st_moe_pytorch/st_moe_pytorch.py",
    reference=reference,
    router="gate",
)
BLOCKS = {
    "st-moe-pytorch TopNGating": _shape(build=MoE),
    "st-moe-pytorch TopNGating, differentiable": _shape(build=partial(MoE, differentiable_topk=True)),
}
