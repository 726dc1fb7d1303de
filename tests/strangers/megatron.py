"""Megatron-LM: a router that ranks its experts again for an auxiliary loss, and one that owns a bias and counts.

A custom autograd function adds the gradients of both losses; a global tracker keeps their values.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional

from tests.strangers.slow import best, mix, normalised, of
from tests.strangers.stranger import D, E, Stranger, random_

_MOE_METRICS: dict = {}


class MoEAuxLossAutoScaler(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, aux_loss):
        ctx.save_for_backward(aux_loss)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        (aux_loss,) = ctx.saved_tensors
        return grad_output, torch.ones_like(aux_loss)


class TopKRouter(nn.Module):
    def __init__(self, score_function, enable_expert_bias):
        super().__init__()
        self.config = SimpleNamespace(num_moe_experts=E, moe_router_topk=2)
        self.topk, self.score_function, self.enable_expert_bias = 2, score_function, enable_expert_bias
        self.weight = nn.Parameter(torch.empty(E, D))
        if enable_expert_bias:
            self.register_buffer("local_tokens_per_expert", torch.zeros(E), persistent=False)
            self.register_buffer("expert_bias", torch.zeros(E))
        else:
            self.local_tokens_per_expert = self.expert_bias = None

    def _maintain_float32_expert_bias(self):
        if self.expert_bias is not None and self.expert_bias.dtype != torch.float32:
            self.expert_bias.data = self.expert_bias.data.to(torch.float32)

    def track(self, name, loss, activation):
        _MOE_METRICS[name] = _MOE_METRICS.get(name, 0) + loss.detach()
        return MoEAuxLossAutoScaler.apply(activation, loss)

    def routing(self, logits):
        if self.score_function == "softmax":
            scores, ids = torch.topk(logits, k=self.topk, dim=1, sorted=torch.is_grad_enabled())
            probs = torch.softmax(scores, dim=-1, dtype=torch.float32)
        else:
            scores = torch.sigmoid(logits.float())
            if self.expert_bias is not None:
                _, ids = torch.topk(scores + self.expert_bias.float(), k=self.topk, dim=1)
                scores = torch.gather(scores, dim=1, index=ids)
            else:
                scores, ids = torch.topk(scores, k=self.topk, dim=1)
            probs = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
        probs = torch.zeros_like(logits).scatter(1, ids, probs.type_as(logits))
        return probs, torch.zeros_like(logits).int().scatter(1, ids, 1).bool()

    def forward(self, input):
        self._maintain_float32_expert_bias()
        logits = functional.linear(input, self.weight.to(input.dtype)).view(-1, E)
        if self.training and torch.is_grad_enabled():
            logits = self.track("z_loss", torch.mean(torch.square(torch.logsumexp(logits, dim=-1))), logits)
        probs, routing_map = self.routing(logits)
        if self.training and torch.is_grad_enabled():
            scores = torch.softmax(logits, dim=-1, dtype=torch.float32)
            _, top_indices = torch.topk(scores, k=self.topk, dim=1)
            used = torch.zeros_like(logits).int().scatter(1, top_indices, 1).bool().sum(dim=0)
            aux_loss = torch.sum(scores.mean(dim=0) * used) * E / (len(logits) * self.topk) * 1e-2
            probs = self.track("load_balancing_loss", aux_loss, probs)
        if self.enable_expert_bias and torch.is_grad_enabled():
            with torch.no_grad():
                self.local_tokens_per_expert += routing_map.sum(dim=0)
        return probs, routing_map


class MoELayer(nn.Module):
    def __init__(self, score_function, enable_expert_bias):
        super().__init__()
        self.router = TopKRouter(score_function, enable_expert_bias)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, hidden_states):
        probs, routing_map = self.router(hidden_states)
        flat = hidden_states.reshape(-1, D)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            rows = routing_map[:, e].nonzero().squeeze(1)
            out = out.index_add(0, rows, expert(flat[rows]) * probs[rows, e].unsqueeze(1))
        return out.view(hidden_states.shape)


def reference(block, x, bias_E):
    x_TD = x.reshape(-1, D)
    logits_TE = x_TD @ block.router.weight.T
    is_softmax = block.router.score_function == "softmax"
    scores_TE = logits_TE if is_softmax else logits_TE.float().sigmoid()
    ids_TK = best(scores_TE + bias_E, 2)
    weights_TK = scores_TE.gather(1, ids_TK)
    weights_TK = weights_TK.float().softmax(-1) if is_softmax else normalised(weights_TK)
    return ids_TK, mix(x_TD, ids_TK, weights_TK.to(x.dtype), of(block.experts)).view_as(x)


_shape = partial(
    Stranger,
    "NVIDIA/Megatron-LM",
    "d98e8a64ddf34856e74b24714e3bedb2f5a39553",
    "megatron/core/transformer/moe/router.py",
    reference=reference,
    router="router",
    shared=(_MOE_METRICS,),
)
BLOCKS = {
    "Megatron TopKRouter": _shape(build=lambda: random_(MoELayer("softmax", False))),
    "Megatron TopKRouter, expert bias": _shape(
        build=lambda: random_(MoELayer("sigmoid", True)), bias_name="expert_bias"
    ),
}
