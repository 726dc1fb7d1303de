"""Blocks written from scratch in the shapes of well-known code bases; none of them knows of moe_plugin.

Shape legend: B batch, S sequence, T tokens, D model width, E experts, K experts selected per token.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from moe_plugin import balance_
from moe_plugin.metrics import max_violation

DIM, EXPERTS, TOP_K = 16, 8, 2


class Experts(nn.Module):
    """Stacked weights, as torchtitan and transformers hold them."""

    def __init__(self):
        super().__init__()
        self.num_experts = EXPERTS
        self.w1 = nn.Parameter(torch.randn(EXPERTS, DIM, DIM) * DIM**-0.5)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, DIM, DIM) * DIM**-0.5)

    def forward(self, x_TD, weights_TK, ids_TK):
        h_TKD = functional.silu(torch.einsum("td,tkdh->tkh", x_TD, self.w1[ids_TK]))
        return (weights_TK[..., None] * torch.einsum("tkh,tkhd->tkd", h_TKD, self.w2[ids_TK])).sum(1)


class LitGPTBlock(nn.Module):
    """LitGPT's shape: the gate a plain linear layer of the block, numbers in a config, top-k on the logits."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(n_expert=EXPERTS, n_expert_per_token=TOP_K)
        self.gate = nn.Linear(DIM, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(EXPERTS))

    def forward(self, x_BSD):
        x_TD = x_BSD.view(-1, DIM)
        probs_TK, ids_TK = torch.topk(self.gate(x_TD), self.config.n_expert_per_token)
        probs_TK = probs_TK.softmax(dim=1, dtype=torch.float).to(x_TD.dtype)
        y_TD = torch.zeros_like(x_TD)
        for mask_TK, expert in zip((ids_TK == e for e in range(EXPERTS)), self.experts, strict=True):
            token_ids, choice = torch.where(mask_TK)
            y_TD[token_ids] += probs_TK[token_ids, choice, None] * expert(x_TD[token_ids])
        return y_TD.view_as(x_BSD)


class TitanRouter(nn.Module):
    """torchtitan's shape: the bias handed to forward by the block, gate values gathered from unbiased scores."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(DIM, EXPERTS, bias=False)
        self.num_experts, self.top_k, self.route_norm, self.route_scale = EXPERTS, TOP_K, True, 1.0

    def forward(self, x_TD, expert_bias_E=None):
        scores_TE = torch.sigmoid(self.gate(x_TD).float())
        ranked_TE = scores_TE if expert_bias_E is None else scores_TE + expert_bias_E
        _, ids_TK = torch.topk(ranked_TE, k=self.top_k, dim=-1, sorted=False)
        weights_TK = scores_TE.gather(dim=1, index=ids_TK)
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        counts_E = torch.histc(ids_TK.float(), bins=self.num_experts, min=0, max=self.num_experts)
        return weights_TK * self.route_scale, ids_TK, counts_E


class TitanBlock(nn.Module):
    """torchtitan's block, with or without the bias buffer that its own optimizer hook would move."""

    def __init__(self, has_bias=True):
        super().__init__()
        self.router, self.experts = TitanRouter(), Experts()
        bias_E = torch.zeros(EXPERTS) if has_bias else None
        self.register_buffer("expert_bias", bias_E, persistent=True)

    def forward(self, x_BSD):
        x_TD = x_BSD.view(-1, DIM)
        weights_TK, ids_TK, _ = self.router(x_TD, self.expert_bias)
        return self.experts(x_TD, weights_TK, ids_TK).view_as(x_BSD)


class LucidrainsGate(nn.Module):
    """A gate in the style of lucidrains' blocks: batched, a bias-free projection, top-k over the last dimension."""

    def __init__(self):
        super().__init__()
        self.num_gates, self.top_n = EXPERTS, TOP_K
        self.to_gates = nn.Linear(DIM, EXPERTS, bias=False)

    def forward(self, x_BSD):
        gates_BSE = self.to_gates(x_BSD).softmax(dim=-1)
        weights_BSK, ids_BSK = gates_BSE.topk(self.top_n, dim=-1)
        return weights_BSK / weights_BSK.sum(-1, keepdim=True).clamp(min=1e-9), ids_BSK


class LucidrainsBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = LucidrainsGate(), Experts()

    def forward(self, x_BSD):
        weights_BSK, ids_BSK = self.gate(x_BSD)
        return self.experts(x_BSD.view(-1, DIM), weights_BSK.flatten(0, 1), ids_BSK.flatten(0, 1)).view_as(
            x_BSD
        )


class Model(nn.Module):
    """Two residual blocks on hidden states with a common direction, which makes the load uneven."""

    def __init__(self, block):
        super().__init__()
        torch.manual_seed(0)
        self.direction = nn.Parameter(torch.randn(DIM))
        self.layers = nn.ModuleList(block() for _ in range(2))

    def forward(self, x_BSD):
        x_BSD = x_BSD + self.direction
        for layer in self.layers:
            x_BSD = x_BSD + layer(x_BSD)
        return x_BSD


def last_violation(model, rule_settings, steps=120):
    """MaxVio of the last 20 steps of training together, the worst layer's."""
    balanced = balance_(model, **rule_settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    random = torch.Generator().manual_seed(1)
    total = {name: torch.zeros(EXPERTS, dtype=torch.int64) for name in balanced}
    for step in range(steps):
        model(torch.randn(8, 32, DIM, generator=random)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, counts_E in balanced.update().counts.items():
            total[name] += counts_E * (step >= steps - 20)
    return max(max_violation(counts_E).item() for counts_E in total.values())


BLOCKS = {
    "litgpt": LitGPTBlock,
    "torchtitan": TitanBlock,
    "torchtitan without bias": lambda: TitanBlock(has_bias=False),
    "lucidrains": LucidrainsBlock,
}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
class TestBlocks:
    def test_violation_falls_below_a_quarter_of_the_control(self, block):
        control = last_violation(Model(block), {"rule": None})
        assert control > 0.5
        assert last_violation(Model(block), {}) < control / 4

    def test_zero_bias_changes_neither_outputs_nor_gradients(self, block):
        x_BSD = torch.randn(2, 8, DIM)
        plain, model = Model(block), Model(block)
        balance_(model)
        assert torch.equal(model(x_BSD), plain(x_BSD))
        for each in (model, plain):
            each(x_BSD).square().sum().backward()
        pairs = zip(model.parameters(), plain.parameters(), strict=True)
        assert all(torch.equal(ours.grad, theirs.grad) for ours, theirs in pairs)

    def test_large_bias_takes_every_token_at_unbiased_weight(self, block):
        model = Model(block)
        balanced = balance_(model, rule=None)
        for site in balanced.values():
            site.bias[3] = 100.0
        model(torch.randn(2, 8, DIM)).sum().backward()
        assert all(site.counts[3] == 16 for site in balanced.values())


class TestOwnership:
    def test_bias_of_torchtitan_is_driven_and_stays_in_its_checkpoint(self):
        model = Model(TitanBlock)
        keys = list(model.state_dict())
        balanced = balance_(model)
        assert all(site.host_owns_bias for site in balanced.values())
        assert list(model.state_dict()) == keys
