"""Hand-written layers of experts in stacked weights, computed expert by expert: slow and obviously right.

Shape legend: T tokens, D model width, H hidden width, E experts, K experts selected per token.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tests.hosts import SoftmaxRouter

D, H, E, K = 8, 6, 4, 2


class StackedExperts(nn.Module):
    """SwiGLU experts in transformers' layout."""

    def __init__(self, dim: int = D, hidden_dim: int = H, num_experts: int = E):
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, 2 * hidden_dim, dim) / dim**0.5)
        self.down_proj = nn.Parameter(torch.randn(num_experts, dim, hidden_dim) / hidden_dim**0.5)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        y_TD = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            tokens_N, slots_N = (top_k_index == expert).nonzero(as_tuple=True)
            y_ND = self.compute(expert, hidden_states[tokens_N])
            y_ND = y_ND * top_k_weights[tokens_N, slots_N, None]
            y_TD = y_TD.index_add(0, tokens_N, y_ND.to(y_TD.dtype))
        return y_TD

    def compute(self, expert, x_ND):
        gate_NH, up_NH = functional.linear(x_ND, self.gate_up_proj[expert]).chunk(2, -1)
        return functional.linear(self.gated(gate_NH, up_NH), self.down_proj[expert])

    def gated(self, gate_NH, up_NH):
        return functional.silu(gate_NH) * up_NH


class InputFirstExperts(StackedExperts):
    """The same with transposed weights, under other names."""

    def __init__(self):
        super().__init__()
        self.w_in = nn.Parameter(self.gate_up_proj.detach().mT.contiguous())
        self.w_out = nn.Parameter(self.down_proj.detach().mT.contiguous())
        del self.gate_up_proj, self.down_proj

    def compute(self, expert, x_ND):
        gate_NH, up_NH = (x_ND @ self.w_in[expert]).chunk(2, -1)
        return self.gated(gate_NH, up_NH) @ self.w_out[expert]


class StackedBlock(nn.Module):
    """A router and its experts."""

    def __init__(self, experts: type = StackedExperts, router: type = SoftmaxRouter):
        super().__init__()
        self.router = router(D, E, K)
        self.experts = experts()

    def forward(self, x):
        x_TD = x.reshape(-1, x.shape[-1])
        weights_TK, ids_TK = self.router(x_TD)
        return x + self.experts(x_TD, ids_TK, weights_TK).view_as(x)


class StackedHost(nn.Module):
    """Two such layers over embedded tokens."""

    def __init__(self, experts: type = StackedExperts, block: type = StackedBlock):
        super().__init__()
        self.embedding = nn.Embedding(32, D)
        self.layers = nn.ModuleList(block(experts) for _ in range(2))
        self.head = nn.Linear(D, 32)

    def forward(self, tokens_BS, attention_mask=None):
        x = self.embedding(tokens_BS)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)
