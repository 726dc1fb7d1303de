"""LLaMA-MoE: gates that return a dict, one with gumbel noise on its largest logit."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.distributions.normal import Normal
from torch.nn import functional

from tests.strangers.gumbel import drawn, gumbel_map, gumbel_rsample
from tests.strangers.slow import best, mix, of
from tests.strangers.stranger import D, E, Stranger, random_


class SwitchBalancedGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts, self.num_selects = E, 1
        self.gate_network = nn.Sequential(nn.Linear(D, E, bias=False), nn.Tanh(), nn.Linear(E, E, bias=False))
        self.softmax = nn.Softmax(1)

    def forward(self, x):
        logits = self.gate_network(x)
        noisy = logits + gumbel_rsample(logits.shape, device=logits.device).to(logits)
        top1_scores, top1_indices = torch.max(noisy, dim=1)
        importance, load = self.softmax(logits).mean(0), top1_indices.bincount(minlength=self.num_experts)
        loss = self.num_experts * torch.sum(importance * (load / x.shape[0]))
        sizes = load.tolist()
        return {
            "topK_indices": top1_indices,
            "topK_scores": top1_scores,
            "sizes": sizes,
            "balance_loss": loss,
        }


class TopKBalancedNoisyGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts, self.num_selects = E, 2
        self.gate_network = nn.Linear(D, E, bias=False)
        self.weight_noise = nn.Linear(D, E, bias=False)
        self.softmax, self.softplus, self.normal = nn.Softmax(1), nn.Softplus(), Normal(0.0, 1.0)

    def cv_squared(self, x):
        return x.float().var() / (x.float().mean() ** 2 + 1e-10)

    def forward(self, x):
        logits_gate = self.gate_network(x)
        noise_control = self.softplus(self.weight_noise(x)) + 1e-2
        logits_noise = torch.randn_like(logits_gate) * noise_control
        logits = logits_gate + logits_noise
        top_logits, top_indices = logits.topk(min(self.num_selects + 1, self.num_experts), dim=1)
        ids = top_indices[:, : self.num_selects]
        scores = self.softmax(top_logits[:, : self.num_selects].to(torch.float32)).to(logits.dtype)
        importance = torch.zeros_like(logits, requires_grad=True).scatter(1, ids, scores).sum(0)
        positions = torch.arange(top_logits.size(0)) * top_logits.size(1) + self.num_selects
        if_in = torch.gather(top_logits.flatten(), 0, positions).unsqueeze(1)
        if_out = torch.gather(top_logits.flatten(), 0, positions - 1).unsqueeze(1)
        prob_in = self.normal.cdf((logits_gate - if_in) / noise_control)
        prob_out = self.normal.cdf((logits_gate - if_out) / noise_control)
        load = torch.where(torch.gt(logits_noise, if_in), prob_in, prob_out).sum(0)
        loss = (self.cv_squared(importance) + self.cv_squared(load)) * 1e-2
        return {"topK_indices": ids, "topK_scores": scores, "balance_loss": loss, "load": load}


class UniversalCalculator(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts, self.num_experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E)), E

    def forward(self, x, topK_indices, topK_scores, sizes=None, **_):
        rows = torch.arange(len(x)).repeat_interleave(topK_indices.numel() // len(x))
        topK_indices, topK_scores = topK_indices.flatten(), topK_scores.flatten()
        _, order = topK_indices.sort(0)
        if sizes is None:
            sizes = topK_indices.bincount(minlength=self.num_experts).tolist()
        parts = torch.split(x.index_select(0, rows.index_select(0, order)), sizes, dim=0)
        outputs = torch.cat([self.experts[i](part) for i, part in enumerate(parts) if len(part)])
        outputs = outputs * topK_scores.index_select(0, order).reshape(-1, 1)
        return torch.zeros_like(x).index_add(0, rows.index_select(0, order), outputs)


class LinearGLUMoELayer(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.gate, self.calculator = gate, UniversalCalculator()

    def forward(self, x):
        flat = x.reshape(-1, D)
        gate_outputs = self.gate(flat)
        return self.calculator(flat, **gate_outputs).reshape(x.shape), gate_outputs["balance_loss"]


def switch(block, x, bias_E):
    x_TD = x.reshape(-1, D)
    scores_TE = block.gate.gate_network(x_TD)
    scores_TE = scores_TE + drawn(scores_TE.shape)
    ids_T1 = best(scores_TE + bias_E, 1)
    return ids_T1, mix(x_TD, ids_T1, scores_TE.gather(1, ids_T1), of(block.calculator.experts)).view_as(x)


def noisy(block, x, bias_E):
    x_TD, gate = x.reshape(-1, D), block.gate
    spread_TE = functional.softplus(gate.weight_noise(x_TD)) + 1e-2
    scores_TE = gate.gate_network(x_TD) + torch.randn_like(spread_TE) * spread_TE
    ids_TK = best(scores_TE + bias_E, 2)
    weights_TK = scores_TE.gather(1, ids_TK).softmax(1)
    return ids_TK, mix(x_TD, ids_TK, weights_TK, of(block.calculator.experts)).view_as(x)


_shape = partial(
    Stranger,
    "pjlab-sys4nlp/llama-moe",
    "b17aff436cce58e2fcd7327789c7fadafe15d19e",
    "smoe/modules/moe/moe_gates.py",
    router="gate",
)
BLOCKS = {
    "LLaMA-MoE SwitchBalancedGate": _shape(
        build=lambda: LinearGLUMoELayer(SwitchBalancedGate()), reference=switch, top_k=1, shared=(gumbel_map,)
    ),
    "LLaMA-MoE TopKBalancedNoisyGate": _shape(
        build=lambda: random_(LinearGLUMoELayer(TopKBalancedNoisyGate())), reference=noisy
    ),
}
