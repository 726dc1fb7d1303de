"""Time-MoE: Mixtral's loop over experts, with a gated shared expert, and the logits returned."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tests.strangers.slow import best, mix, of
from tests.strangers.stranger import D, E, Stranger


class TimeMoeSparseExpertsLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.top_k, self.hidden_size, self.num_experts, self.norm_topk_prob = 2, D, E, False
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        self.shared_expert, self.shared_expert_gate = nn.Linear(D, D), nn.Linear(D, 1, bias=False)

    def forward(self, hidden_states):
        flat = hidden_states.view(-1, D)
        router_logits = self.gate(flat)
        weights = functional.softmax(router_logits, dim=1, dtype=torch.float)
        weights, selected_experts = torch.topk(weights, self.top_k, dim=-1)
        weights, final = weights.to(flat.dtype), torch.zeros_like(flat)
        expert_mask = functional.one_hot(selected_experts, num_classes=self.num_experts).permute(2, 1, 0)
        for expert_idx in range(self.num_experts):
            idx, top_x = torch.where(expert_mask[expert_idx])
            current = self.experts[expert_idx](flat[None, top_x].reshape(-1, D)) * weights[top_x, idx, None]
            final.index_add_(0, top_x, current.to(flat.dtype))
        shared = functional.sigmoid(self.shared_expert_gate(flat)) * self.shared_expert(flat)
        return (final + shared).reshape(hidden_states.shape), router_logits


def reference(block, x, bias_E):
    x_TD = x.reshape(-1, D)
    scores_TE = block.gate(x_TD).float().softmax(1)
    ids_TK = best(scores_TE + bias_E, 2)
    shared_TD = block.shared_expert_gate(x_TD).sigmoid() * block.shared_expert(x_TD)
    mixed_TD = mix(x_TD, ids_TK, scores_TE.gather(1, ids_TK).to(x.dtype), of(block.experts))
    return ids_TK, (mixed_TD + shared_TD).view_as(x)


BLOCKS = {
    "Time-MoE TimeMoeSparseExpertsLayer": Stranger(
        "Time-MoE/Time-MoE",
        "d3524fdaa5c0e83a29a6cc01828194dd870ec7b6",
        "time_moe/models/modeling_time_moe.py",
        TimeMoeSparseExpertsLayer,
        reference,
    )
}
