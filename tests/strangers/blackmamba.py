"""BlackMamba: the largest sigmoid, in a block whose list of experts is called `local_experts`."""

from __future__ import annotations

import torch
from torch import nn

from tests.strangers.slow import best, mix, of
from tests.strangers.stranger import D, E, Stranger


class SwitchMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_moe_experts, self.routing = E, "sinkhorn"
        self.router, self.router_activation = nn.Linear(D, E), torch.sigmoid
        self.num_local_experts, self.local_expert_indices = E, list(range(E))
        self.local_experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, hidden_states, inference_params=None):
        route = self.router(hidden_states).view(-1, self.num_moe_experts)
        route = self.router_activation(route) if self.routing == "sinkhorn" else torch.softmax(route, dim=1)
        max_prob, max_ind = torch.max(route, dim=1)
        flat = hidden_states.view(-1, D)
        total = torch.zeros_like(flat)
        for number, expert in enumerate(self.local_experts):
            rows = (max_ind == self.local_expert_indices[number]).nonzero()
            total[rows, :] = expert(flat[rows, :])
        return (total * torch.unsqueeze(max_prob, 1)).view(hidden_states.shape)


def reference(block, x, bias_E):
    x_TD = x.reshape(-1, D)
    scores_TE = block.router(x_TD).sigmoid()
    ids_T1 = best(scores_TE + bias_E, 1)
    return ids_T1, mix(x_TD, ids_T1, scores_TE.gather(1, ids_T1), of(block.local_experts)).view_as(x)


BLOCKS = {
    "BlackMamba SwitchMLP": Stranger(
        "Zyphra/BlackMamba",
        "5c8cddddb07890f1b97994ff913452d9626a71a9",
        "switch_mlp.py",
        SwitchMLP,
        reference,
        top_k=1,
    )
}
