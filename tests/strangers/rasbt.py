"""LLMs-from-scratch: top-k of logits, then a loop over those experts that some token selected."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tests.strangers.slow import best, mix
from tests.strangers.stranger import D, E, Stranger


class MoEFeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts_per_tok, self.num_experts, self.emb_dim = 2, E, D
        self.gate = nn.Linear(D, E, bias=False)
        for name in ("fc1", "fc2", "fc3"):
            setattr(self, name, nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(E)))

    def forward(self, x):
        top_scores, top_ids = torch.topk(self.gate(x), self.num_experts_per_tok, dim=-1)
        probs = torch.softmax(top_scores, dim=-1).reshape(-1, self.num_experts_per_tok)
        x_flat, ids = x.reshape(-1, self.emb_dim), top_ids.reshape(-1, self.num_experts_per_tok)
        out = torch.zeros_like(x_flat)
        for expert_tensor in torch.unique(ids):
            expert = int(expert_tensor.item())
            mask = ids == expert
            chosen = mask.any(dim=-1).nonzero().squeeze(-1)
            if chosen.numel() == 0:
                continue
            part = x_flat.index_select(0, chosen)
            hidden = self.fc3[expert](functional.silu(self.fc1[expert](part)) * self.fc2[expert](part))
            slots = mask[chosen].int().argmax(dim=-1, keepdim=True)
            weights = torch.gather(probs.index_select(0, chosen), -1, slots)
            out.index_add_(0, chosen, hidden * weights)
        return out.reshape(x.shape)


def reference(block, x, bias_E):
    x_TD = x.reshape(-1, D)
    scores_TE = block.gate(x_TD)
    ids_TK = best(scores_TE + bias_E, 2)

    def expert(e, x):
        return block.fc3[e](functional.silu(block.fc1[e](x)) * block.fc2[e](x))

    return ids_TK, mix(x_TD, ids_TK, scores_TE.gather(1, ids_TK).softmax(-1), expert).view_as(x)


BLOCKS = {
    "LLMs-from-scratch MoEFeedForward": Stranger(
        "rasbt/LLMs-from-scratch",
        "28c65cdfbc3338e2e040016eea4b7fdf556e4d57",
        "ch04/07_moe/gpt_with_kv_moe.py",
        MoEFeedForward,
        reference,
    )
}
