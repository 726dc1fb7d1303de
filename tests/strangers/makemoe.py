"""makeMoE: a noisy top-k router whose output is a softmax over -inf; experts take a limited number of tokens."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tests.strangers.slow import best, mix, of
from tests.strangers.stranger import D, E, Stranger


class NoisyTopkRouter(nn.Module):
    def __init__(self):
        super().__init__()
        self.top_k = 2
        self.topkroute_linear = nn.Linear(D, E)
        self.noise_linear = nn.Linear(D, E)

    def forward(self, mh_output):
        logits = self.topkroute_linear(mh_output)
        noisy_logits = logits + torch.randn_like(logits) * functional.softplus(self.noise_linear(mh_output))
        top_k_logits, indices = noisy_logits.topk(self.top_k, dim=-1)
        zeros = torch.full_like(noisy_logits, float("-inf"))
        return functional.softmax(zeros.scatter(-1, indices, top_k_logits), dim=-1), indices


class SparseMoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = NoisyTopkRouter()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.ReLU()) for _ in range(E))
        self.top_k, self.capacity_factor, self.num_experts = 2, 1.0, E

    def forward(self, x):
        gating_output, indices = self.router(x)
        flat_x, gates = x.view(-1, D), gating_output.view(-1, self.num_experts)
        capacity = int(len(flat_x) * self.top_k / self.num_experts * self.capacity_factor)
        updates = torch.zeros_like(flat_x)
        for i, expert in enumerate(self.experts):
            chosen = torch.nonzero((indices == i).any(dim=-1).view(-1)).squeeze(-1)
            limited = chosen[:capacity] if chosen.numel() > capacity else chosen
            if limited.numel() > 0:
                updates.index_add_(0, limited, expert(flat_x[limited]) * gates[limited, i].unsqueeze(1))
        return torch.zeros_like(x) + updates.view(x.shape)


def reference(block, x, bias_E):
    x_TD, router = x.reshape(-1, D), block.router
    logits_TE, spread_TE = router.topkroute_linear(x_TD), functional.softplus(router.noise_linear(x_TD))
    logits_TE = logits_TE + torch.randn_like(logits_TE) * spread_TE
    ids_TK = best(logits_TE + bias_E, 2)
    kept_TK, taken = torch.zeros_like(ids_TK, dtype=torch.bool), [0] * E
    for t, ids in enumerate(ids_TK.tolist()):
        for place, e in enumerate(ids):
            kept_TK[t, place] = taken[e] < len(x_TD) * 2 // E
            taken[e] += 1
    weights_TK = logits_TE.gather(1, ids_TK).softmax(-1) * kept_TK
    return ids_TK, mix(x_TD, ids_TK, weights_TK, of(block.experts)).view_as(x)


BLOCKS = {
    "makeMoE SparseMoE": Stranger(
        "AviSoori1x/makeMoE",
        "0d68228adb1ee8a0bbebb8a27ca84388ad72e1a0",
        "makeMoE.py",
        SparseMoE,
        reference,
        router="router",
    )
}
