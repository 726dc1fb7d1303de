"""Blocks whose tokens select no experts, so nothing can be balanced: soft MoE, and experts that choose tokens."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tests.strangers.stranger import D, E, Stranger


class SoftMoE(nn.Module):
    """Every expert computes averages of all tokens."""

    def __init__(self, num_slots=2):
        super().__init__()
        self.norm, self.num_experts = nn.RMSNorm(D), E
        self.slot_embeds = nn.Parameter(torch.randn(E, num_slots, D))
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x):
        x = self.norm(x)
        logits = torch.einsum("bnd,esd->bnes", x, self.slot_embeds)
        slots = torch.einsum("bnd,bnes->besd", x, logits.softmax(dim=1))
        out = torch.stack([expert(slots[:, e]) for e, expert in enumerate(self.experts)], dim=1)
        return torch.einsum("bsd,bns->bnd", out.flatten(1, 2), logits.flatten(2).softmax(dim=-1))


class ExpertChoiceMoE(nn.Module):
    """Every expert selects its tokens."""

    def __init__(self):
        super().__init__()
        self.n_experts, self.capacity_factor, self.top_k = E, 2.0, 8
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        self.router = nn.Linear(D, E, bias=False)

    def forward(self, inputs):
        flat = inputs.view(-1, D)
        top_k = min(self.top_k, int(self.capacity_factor * len(flat) / self.n_experts))
        probs = functional.softmax(self.router(flat), dim=-1, dtype=torch.float32)
        weights, selected_tokens = torch.topk(probs.T, top_k)
        results = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            out = expert(flat[selected_tokens[i]]) * weights[i, :, None].to(flat.dtype)
            results = results.index_add(0, selected_tokens[i], out)
        return results.view(inputs.shape)


BLOCKS = {
    "soft-moe-pytorch SoftMoE": Stranger(
        "lucidrains/soft-moe-pytorch",
        "f3779d58860bb302a45459fc7ab5c5e24005d46c",
        "soft_moe_pytorch/soft_moe.py",
        SoftMoE,
        refused="SoftMoE",
    ),
    "swiss-ai/MoE ExpertChoiceMoE": Stranger(
        "swiss-ai/MoE",
        "60fc78cf837aaf1d9e2c74ea78330490e2824e55",
        "moe.py",
        ExpertChoiceMoE,
        refused="ExpertChoiceMoE lets its experts choose|layers.*expert choice",
    ),
}
