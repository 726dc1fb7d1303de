"""Hand-written MoE models as a user would have them, without any moe_plugin code.

Shape legend: T tokens, D model width, E experts, K experts selected per token.
"""

from __future__ import annotations

import torch
from torch import nn


class SoftmaxRouter(nn.Module):
    """Softmax before top-k, normalised: Mixtral and Qwen3 style, without its own bias."""

    def __init__(self, dim: int, num_experts: int, top_k: int):
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.weight = nn.Parameter(torch.randn(num_experts, dim))

    def forward(self, x_TD):
        scores_TE = (x_TD @ self.weight.T).float().softmax(-1)
        weights_TK, ids_TK = torch.topk(scores_TE, self.top_k, dim=-1)
        return weights_TK / weights_TK.sum(-1, keepdim=True), ids_TK


class GroupedRouter(SoftmaxRouter):
    """DeepSeek-V2 style: experts outside the best group are masked by exact zeros."""

    num_groups = 2

    def forward(self, x_TD):
        scores_TE = (x_TD @ self.weight.T).softmax(-1)
        grouped_TGE = scores_TE.view(len(x_TD), self.num_groups, -1)
        group_T = grouped_TGE.amax(-1).argmax(-1)
        open_TG = nn.functional.one_hot(group_T, self.num_groups).bool()
        masked_TE = grouped_TGE.masked_fill(~open_TG.unsqueeze(-1), 0.0).flatten(1)
        return masked_TE.topk(k=self.top_k, dim=-1, sorted=False)


class OwningRouter(SoftmaxRouter):
    """DeepSeek-V3 style: sigmoid scores and a correction bias in the model's own checkpoint."""

    def __init__(self, dim: int, num_experts: int, top_k: int):
        super().__init__(dim, num_experts, top_k)
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts))

    def forward(self, x_TD):
        scores_TE = (x_TD @ self.weight.T).float().sigmoid()
        ids_TK = torch.topk(scores_TE + self.e_score_correction_bias, self.top_k)[1]
        return scores_TE.gather(-1, ids_TK), ids_TK


class Block(nn.Module):
    """Dense computation of every expert, weighted by the router: slow and obviously right."""

    def __init__(self, router: nn.Module, dim: int):
        super().__init__()
        self.router = router
        self.experts = nn.ModuleList(nn.Linear(dim, dim) for _ in range(router.num_experts))

    def forward(self, x):
        x_TD = x.reshape(-1, x.shape[-1])
        weights_TK, ids_TK = self.router(x_TD)
        gates_TE = x_TD.new_zeros(len(x_TD), len(self.experts)).scatter(1, ids_TK, weights_TK.to(x_TD.dtype))
        outputs_TED = torch.stack([expert(x_TD) for expert in self.experts], dim=1)
        return x + (gates_TE.unsqueeze(-1) * outputs_TED).sum(1).view_as(x)


class Host(nn.Module):
    """Two MoE layers over embedded tokens, with a padding mask it does not need."""

    def __init__(self, router: type = SoftmaxRouter, dim: int = 8, num_experts: int = 4, top_k: int = 2):
        super().__init__()
        self.embedding = nn.Embedding(32, dim)
        self.layers = nn.ModuleList(Block(router(dim, num_experts, top_k), dim) for _ in range(2))
        self.head = nn.Linear(dim, 32)

    def forward(self, tokens_BS, attention_mask=None):
        x = self.embedding(tokens_BS)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)
