"""Grok-1 for transformers: the decoder layer itself routes, between norms; its list of experts is called `moe`."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tests.strangers.slow import best, mix, of
from tests.strangers.stranger import D, E, Stranger


class GrokDecoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden_size, self.num_experts, self.top_k = D, E, 2
        self.multi_head_attention = nn.Linear(D, D)
        self.router = nn.Linear(D, E, dtype=torch.float32, bias=False)
        self.moe = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        self.rms_norm_2, self.rms_norm_3 = nn.RMSNorm(D), nn.RMSNorm(D)

    def forward(self, hidden_states, output_router_logits=False):
        residual = hidden_states + self.multi_head_attention(hidden_states)
        flat = self.rms_norm_2(residual).view(-1, D)
        router_logits = self.router(flat.to(torch.float))
        weights = functional.softmax(router_logits, dim=1, dtype=torch.float)
        weights, selected_experts = torch.topk(weights, self.top_k, dim=-1)
        weights, final = weights.to(flat.dtype), torch.zeros_like(flat)
        expert_mask = functional.one_hot(selected_experts, num_classes=self.num_experts).permute(2, 1, 0)
        for expert_idx in range(self.num_experts):
            idx, top_x = torch.where(expert_mask[expert_idx])
            if top_x.shape[0] == 0:
                continue
            rows, slots = top_x.tolist(), idx.tolist()
            current = self.moe[expert_idx](flat[None, rows].reshape(-1, D)) * weights[rows, slots, None]
            final.index_add_(0, top_x, current.to(flat.dtype))
        outputs = (residual + self.rms_norm_3(final.reshape(residual.shape)),)
        return (*outputs, router_logits) if output_router_logits else outputs


def reference(block, x, bias_E):
    residual = x + block.multi_head_attention(x)
    x_TD = block.rms_norm_2(residual).reshape(-1, D)
    scores_TE = block.router(x_TD.float()).softmax(1)
    ids_TK = best(scores_TE + bias_E, 2)
    mixed_TD = mix(x_TD, ids_TK, scores_TE.gather(1, ids_TK).to(x.dtype), of(block.moe))
    return ids_TK, residual + block.rms_norm_3(mixed_TD.view_as(x))


BLOCKS = {
    "Grok-1 GrokDecoderLayer": Stranger(
        "Aqwu/grok-1-hf",
        "1383ccd75057318adb7186502bf68c77babc72bb",
        "modeling_grok.py",
        GrokDecoderLayer,
        reference,
    )
}
