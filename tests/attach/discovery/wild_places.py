"""Routers that differ in where experts and router are kept; see `wild_block`.

Shape legend: S sequence, T tokens, D model width, E experts, K experts selected per token.
"""

from __future__ import annotations

import types

import torch
from torch import nn

from tests.attach.discovery.wild_block import Block, D, E, K, OfLogits, Wild


class NamedExperts(Wild):
    def make_experts(self):
        return nn.ModuleDict({f"e{number}": nn.Linear(D, D) for number in range(E)})

    def outputs(self, x_TD):
        return torch.stack([self.ffns.get_submodule(f"e{number}")(x_TD) for number in range(E)], dim=1)


class BareMatrices(Wild):
    def make_experts(self):
        return nn.ParameterList(nn.Parameter(torch.randn(D, D) / 4) for _ in range(E))

    def outputs(self, x_TD):
        return torch.stack([x_TD @ matrix for matrix in self.ffns], dim=1)


class NumberedExperts(Wild):
    def make_experts(self):
        for number in range(E):
            setattr(self, f"expert_{number}", nn.Linear(D, D))

    def outputs(self, x_TD):
        return torch.stack([getattr(self, f"expert_{number}")(x_TD) for number in range(E)], dim=1)


class FusedExperts(Wild):
    """One matrix for all, and numbers in an object that is no HF config."""

    def make_experts(self):
        self.args = types.SimpleNamespace(moe=types.SimpleNamespace(num_experts=E))
        return nn.Linear(D, E * D)

    def outputs(self, x_TD):
        return self.ffns(x_TD).view(-1, E, D)


class StackedWeights(OfLogits):
    """Experts as one 3-D tensor, sizes nowhere but in shapes, the gate a bare matrix (D, E)."""

    def __init__(self):
        nn.Module.__init__(self)
        self.w_gate = nn.Parameter(torch.randn(D, E))
        self.w = nn.Parameter(torch.randn(E, D, D))

    def scores(self, x_TD):
        return (x_TD @ self.w_gate).float()

    def outputs(self, x_TD):
        return torch.stack([x_TD @ matrix.T for matrix in self.w], dim=1)

    def forward(self, x):
        x_TD = x.reshape(-1, D)
        weights_TK, ids_TK = (x_TD @ self.w_gate).float().topk(2, dim=-1)
        chosen_TKD = torch.einsum("td,tkde->tke", x_TD, self.w[ids_TK].mT)
        return (weights_TK.softmax(-1).unsqueeze(-1) * chosen_TKD).sum(1).view_as(x)


class LowRankExperts(Wild):
    """LoRA experts next to a frozen matrix."""

    def make_experts(self):
        self.base = nn.Linear(D, D).requires_grad_(False)
        self.lora_b = nn.ModuleList(nn.Linear(2, D, bias=False) for _ in range(E))
        return nn.ModuleList(nn.Linear(D, 2, bias=False) for _ in range(E))

    def combine(self, x_TD, gates_TE):
        low = [b(a(x_TD)) for a, b in zip(self.ffns, self.lora_b, strict=True)]
        return self.base(x_TD) + (gates_TE.unsqueeze(-1) * torch.stack(low, dim=1)).sum(1)


class LoopOverExperts(OfLogits):
    """LitGPT: numbers in a config, and every expert runs on the tokens that chose it."""

    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(n_expert=E, n_expert_per_token=K)

    def forward(self, x):
        x_TD = x.reshape(-1, D)
        values_TK, ids_TK = torch.topk(self.gate(x_TD), self.config.n_expert_per_token)
        weights_TK, y_TD = values_TK.softmax(dim=1, dtype=torch.float), torch.zeros_like(x_TD)
        for mask_TK, expert in zip((ids_TK == e for e in range(E)), self.ffns, strict=True):
            tokens, choice = torch.where(mask_TK)
            y_TD[tokens] += weights_TK[tokens, choice, None] * expert(x_TD[tokens])
        return y_TD.view_as(x)


class InDecoderLayer(Wild):
    """Routes in the decoder layer itself, next to an attention with its own topk."""

    class SparseAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(D, D)

        def forward(self, x):
            scores = torch.einsum("...sd,...td->...st", self.q(x), x)
            kept = scores.topk(min(3, scores.shape[-1]), dim=-1)
            return torch.zeros_like(scores).scatter(-1, kept.indices, kept.values.softmax(-1)) @ x

    def __init__(self):
        super().__init__()
        self.attention = self.SparseAttention()

    def forward(self, x, attention_mask=None):
        x = x + self.attention(x)
        x_TD = x.reshape(-1, D)
        return x + self.combine(x_TD, self.gates(self.scores(x_TD))).view_as(x)

    def rows_of(self, x):
        return (x + self.attention(x)).reshape(-1, D)

    def output(self, x, gates_TE):
        x_TD = self.rows_of(x)
        return (x_TD + self.combine(x_TD, gates_TE)).view_as(x)


class TopKLayer(nn.Module):
    """A selection as a module without parameters."""

    def forward(self, scores_TE):
        return scores_TE.topk(K)


class InSequential(Block):
    """The router is a Sequential that ends in a selecting layer."""

    def __init__(self):
        super().__init__()
        self.router = nn.Sequential(nn.Sequential(nn.Linear(D, E), nn.Softmax(-1)), TopKLayer())

    def scores(self, x_TD):
        return self.router.get_submodule("0")(x_TD)

    def forward(self, x):
        return self.mix(x, *self.router(self.rows_of(x)))


class DeepInSequential(InSequential):
    def __init__(self):
        super().__init__()
        self.router = nn.Sequential(self.router)

    def scores(self, x_TD):
        return self.router.get_submodule("0.0")(x_TD)


class MethodRouter(nn.Module):
    """Is never called as a module."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, E)

    def route(self, x_TD):
        return self.gate(x_TD).softmax(-1).topk(K)


class ForwardRouter(MethodRouter):
    def forward(self, x_TD):
        return self.route(x_TD)


class WithRouter(Block):
    """A block that is given its router."""

    def __init__(self, router=None):
        super().__init__()
        self.router = ForwardRouter() if router is None else router

    def scores(self, x_TD):
        return self.router.gate(x_TD).softmax(-1)

    def forward(self, x):
        return self.mix(x, *self.router(self.rows_of(x)))


class ByMethod(WithRouter):
    def __init__(self):
        super().__init__(MethodRouter())

    def forward(self, x):
        return self.mix(x, *self.router.route(self.rows_of(x)))


class ForwardByName(WithRouter):
    """``router.forward(...)``, past the hooks."""

    def forward(self, x):
        return self.mix(x, *self.router.forward(self.rows_of(x)))


class CalledTwice(WithRouter):
    """Tokens of two kinds go through the router one after the other."""

    def forward(self, x):
        parts = [self.router(part_TD) for part_TD in self.rows_of(x).chunk(2)]
        values, ids = (torch.cat(each) for each in zip(*parts, strict=True))
        return self.mix(x, values, ids)
