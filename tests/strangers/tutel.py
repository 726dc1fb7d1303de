"""Tutel: top-k with places counted by `cumsum`; the tokens with the largest scores may come first.

The layer itself ranks, in a function inside of its forward, and leaves the loss on its output.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from tests.strangers.slow import best, first_come, mix, of
from tests.strangers.stranger import D, E, Stranger


class LinearTopKGate(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.wg, self.top_k = nn.Linear(D, E, bias=False), k
        self.gate_noise, self.capacity_factor = 0.1, 1.0

    def forward(self, x):
        return self.wg(x.to(dtype=self.wg.weight.dtype))


class CosineTopKGate(LinearTopKGate):
    def __init__(self, k):
        super().__init__(k)
        del self.wg
        self.temperature = nn.Parameter(torch.log(torch.full([1], 2.0)))
        self.cosine_projector, self.sim_matrix = nn.Linear(D, D), nn.Parameter(torch.randn(D, E))

    def forward(self, x):
        cosines = functional.normalize(self.cosine_projector(x), dim=1) @ functional.normalize(
            self.sim_matrix, dim=0
        )
        return cosines * torch.clamp(self.temperature, max=4.6).exp()


def fast_cumsum_sub_one(mask):
    return torch.cumsum(mask, dim=0) - 1


def compute_sorted_location(mask, importance):
    order = importance.argsort(dim=0)
    return (fast_cumsum_sub_one(mask[order]) * mask[order])[order.argsort(dim=0)]


def extract_critical(scores, top_k, capacity_factor, batch_prioritized_routing):
    topk_indices = torch.topk(scores, top_k, dim=1).indices
    indices_s = [each.view(-1) for each in topk_indices.chunk(top_k, dim=1)]
    masks_se = [functional.one_hot(each, num_classes=scores.size(1)) for each in indices_s]
    gates_s = [(scores * each).sum(dim=1) for each in masks_se]
    l_loss = torch.sum(scores.mean(dim=0) * masks_se[0].to(scores.dtype).mean(dim=0)) * scores.size(1)
    locate = fast_cumsum_sub_one
    if batch_prioritized_routing:
        importance_scores = -1 * scores.max(dim=1)[0]
        locate = partial(compute_sorted_location, importance=importance_scores)
    locations_s, acc_base = [], 0
    for mask in masks_se:
        locations_s.append(torch.sum((locate(mask) + acc_base) * mask, dim=1))
        acc_base = acc_base + torch.sum(mask, dim=0, keepdim=True)
    if top_k > 1:
        denom_s = torch.clamp(sum(gates_s), min=torch.finfo(gates_s[0].dtype).eps)
        gates_s = [each / denom_s for each in gates_s]
    per_expert = (scores.size(0) + scores.size(1) - 1) // scores.size(1)
    return indices_s, locations_s, gates_s, top_k * int(capacity_factor * per_expert), l_loss


class MOELayer(nn.Module):
    def __init__(self, gate, batch_prioritized_routing):
        super().__init__()
        self.num_global_experts, self.batch_prioritized_routing = E, batch_prioritized_routing
        self.gates = nn.ModuleList([gate])
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, input, gate_index=0, capacity_factor=None, top_k=None):
        x, gctx = input.reshape(-1, D), self.gates[gate_index]
        top_k = top_k or gctx.top_k

        def routing():
            logits = logits_w_noise = gctx(x)
            if self.training and gctx.gate_noise > 0:
                logits_w_noise = logits + gctx.gate_noise * torch.randn_like(logits) / E
            factor = capacity_factor or gctx.capacity_factor
            return extract_critical(
                functional.softmax(logits_w_noise, dim=1), top_k, factor, self.batch_prioritized_routing
            )

        indices_s, locations_s, gates_s, capacity, l_aux = routing()
        y = torch.zeros_like(x)
        for ids, places, weights in zip(indices_s, locations_s, gates_s, strict=True):
            for e, expert in enumerate(self.experts):
                rows = torch.where((ids == e) & (places < capacity))[0]
                y = y.index_add(0, rows, expert(x[rows]) * weights[rows].unsqueeze(1).to(x.dtype))
        y = y.view(input.shape)
        self.l_aux = y.l_aux = l_aux
        return y


def reference(block, x, bias_E):
    x_TD, gate = x.reshape(-1, D), block.gates[0]
    logits_TE = gate(x_TD)
    scores_TE = (logits_TE + gate.gate_noise * torch.randn_like(logits_TE) / E).softmax(1)
    ids_TK = best(scores_TE + bias_E, gate.top_k)
    weights_TK = scores_TE.gather(1, ids_TK)
    if gate.top_k > 1:
        weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
    largest, prioritized = scores_TE.amax(1).tolist(), block.batch_prioritized_routing
    order = sorted(range(len(x_TD)), key=lambda t: -largest[t]) if prioritized else None
    kept_TK = first_come(ids_TK, gate.top_k * -(-len(x_TD) // E), order=order)
    return ids_TK, mix(x_TD, ids_TK, weights_TK * kept_TK, of(block.experts)).view_as(x)


_shape = partial(
    Stranger,
    "microsoft/tutel",
    "82af7aad9fc3ec981395ba97e7242a480984a55e",
    "tutel/impls/fast_dispatch.py",
    reference=reference,
)
BLOCKS = {
    "Tutel MOELayer, k=1": _shape(
        build=lambda: MOELayer(LinearTopKGate(1), batch_prioritized_routing=False), top_k=1
    ),
    "Tutel MOELayer, k=2, prioritized": _shape(
        build=lambda: MOELayer(LinearTopKGate(2), batch_prioritized_routing=True)
    ),
    "Tutel MOELayer, cosine": _shape(
        build=lambda: MOELayer(CosineTopKGate(2), batch_prioritized_routing=False)
    ),
}
