"""DiT-MoE: DeepSeekMoE's gate, whose loss a custom autograd function adds in the backward."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tests.strangers.slow import best, mix, of
from tests.strangers.stranger import D, E, Stranger, random_


class MoEGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.top_k, self.n_routed_experts, self.alpha = 2, E, 0.01
        self.weight = nn.Parameter(torch.empty((E, D)))

    def forward(self, hidden_states):
        scores = functional.linear(hidden_states.view(-1, D), self.weight, None).softmax(dim=-1)
        topk_weight, topk_idx = torch.topk(scores, k=self.top_k, dim=-1, sorted=False)
        if not (self.training and self.alpha > 0.0):
            return topk_idx, topk_weight, None
        mask_ce = functional.one_hot(topk_idx.view(-1), num_classes=self.n_routed_experts)
        fi = mask_ce.float().mean(0) * self.n_routed_experts
        return topk_idx, topk_weight, (scores.mean(0) * fi).sum() * self.alpha


class AddAuxiliaryLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, loss):
        ctx.dtype, ctx.required_aux_loss = loss.dtype, loss.requires_grad
        return x

    @staticmethod
    def backward(ctx, grad_output):
        grad_loss = torch.ones((), dtype=ctx.dtype) if ctx.required_aux_loss else None
        return grad_output, grad_loss


class SparseMoeBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts_per_tok, self.n_shared_experts = 2, 2
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        self.gate, self.shared_experts = MoEGate(), nn.Linear(D, D)

    def forward(self, hidden_states):
        topk_idx, topk_weight, aux_loss = self.gate(hidden_states)
        flat_ids = topk_idx.view(-1)
        x = hidden_states.view(-1, D).repeat_interleave(self.num_experts_per_tok, dim=0)
        y = torch.empty_like(x)
        for i, expert in enumerate(self.experts):
            y[flat_ids == i] = expert(x[flat_ids == i])
        y = (y.view(*topk_weight.shape, -1) * topk_weight.unsqueeze(-1)).sum(dim=1).view(hidden_states.shape)
        if aux_loss is not None:
            y = AddAuxiliaryLoss.apply(y, aux_loss)
        return y + self.shared_experts(hidden_states)


def reference(block, x, bias_E):
    x_TD = x.reshape(-1, D)
    scores_TE = (x_TD @ block.gate.weight.T).softmax(-1)
    ids_TK = best(scores_TE + bias_E, 2)
    mixed_TD = mix(x_TD, ids_TK, scores_TE.gather(1, ids_TK), of(block.experts))
    return ids_TK, (mixed_TD + block.shared_experts(x_TD)).view_as(x)


BLOCKS = {
    "DiT-MoE SparseMoeBlock": Stranger(
        "feizc/DiT-MoE",
        "bd34bbb2945280f0ccc2b1221f7dc8e3d6cce65d",
        "models.py",
        lambda: random_(SparseMoeBlock()),
        reference,
        router="gate",
        in_order=False,
    )
}
