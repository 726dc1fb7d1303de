"""mistral-inference: a block that is given its gate and its experts."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional

from tests.strangers.slow import best, mix, of
from tests.strangers.stranger import D, E, Stranger, tokens


class MoeLayer(nn.Module):
    def __init__(self, experts, gate, moe_args):
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.gate = gate
        self.args = moe_args

    def forward(self, inputs):
        gate_logits = self.gate(inputs)
        weights, selected_experts = torch.topk(gate_logits, self.args.num_experts_per_tok)
        weights = functional.softmax(weights, dim=1, dtype=torch.float).to(inputs.dtype)
        results = torch.zeros_like(inputs)
        for i, expert in enumerate(self.experts):
            batch_idx, nth_expert = torch.where(selected_experts == i)
            results[batch_idx] += weights[batch_idx, nth_expert, None] * expert(inputs[batch_idx])
        return results


def build():
    args = SimpleNamespace(num_experts=E, num_experts_per_tok=2)
    return MoeLayer([nn.Linear(D, D, bias=False) for _ in range(E)], nn.Linear(D, E, bias=False), args)


def reference(block, x_TD, bias_E):
    logits_TE = block.gate(x_TD)
    ids_TK = best(logits_TE + bias_E, 2)
    return ids_TK, mix(x_TD, ids_TK, logits_TE.gather(1, ids_TK).float().softmax(1), of(block.experts))


BLOCKS = {
    "mistral-inference MoeLayer": Stranger(
        "mistralai/mistral-inference",
        "2557e12d0e1878a1562ece30434820f80aa3e12a",
        "src/mistral_inference/moe.py",
        build,
        reference,
        inputs=tokens,
    )
}
