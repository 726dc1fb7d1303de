"""Routers with tensors of one entry per expert: selection biases, and others that are none; see `wild_block`.

Shape legend: T tokens, D model width, E experts, K experts selected per token.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from tests.attach.discovery.wild_block import Block, D, E, K, OfLogits, Wild


@dataclasses.dataclass(frozen=True)
class Routed:
    weights: torch.Tensor
    ids: torch.Tensor


class BiasedGate(Block):
    """gpt-oss: the bias of the gate belongs to the gate weights. The router's output is a dataclass."""

    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(E, D))
            self.bias = nn.Parameter(torch.randn(E))

        def forward(self, x_TD):
            values, ids = (x_TD @ self.weight.T + self.bias).topk(K)
            return Routed(values.softmax(-1), ids)

    def __init__(self):
        super().__init__()
        self.router = self.Router()

    def scores(self, x_TD):
        return x_TD @ self.router.weight.T + self.router.bias

    weigh = OfLogits.weigh

    def forward(self, x):
        routed = self.router(x.reshape(-1, D))
        return self.mix(x, routed.weights, routed.ids)


class BiasedBlock(OfLogits):
    """The same in the block itself."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, D))
        self.bias = nn.Parameter(torch.randn(E))

    def scores(self, x_TD):
        return x_TD @ self.weight.T + self.bias


class Sharpened(Wild):
    def __init__(self):
        super().__init__()
        self.sharpness = nn.Parameter(torch.rand(E) + 0.5)

    def scores(self, x_TD):
        return (self.gate(x_TD) * self.sharpness).sigmoid()


class Scaled(Wild):
    """Gemma 4: a scale per expert after the selection."""

    def __init__(self):
        super().__init__()
        self.per_expert_scale = nn.Parameter(torch.rand(E) + 0.5)

    def weigh(self, scores_TE, ids_TK):
        return scores_TE.gather(1, ids_TK) * self.per_expert_scale[ids_TK]


class LoopingExperts(OfLogits):
    """A gate bias in a block that asks which experts were hit: without data it cannot run to its end."""

    def __init__(self):
        super().__init__()
        self.gate_bias = nn.Parameter(torch.randn(E))

    def scores(self, x_TD):
        return self.gate(x_TD) + self.gate_bias

    def combine(self, x_TD, gates_TE):
        hit = gates_TE.nonzero()[:, 1].unique().tolist()
        assert all(0 <= expert < E for expert in hit)
        return super().combine(x_TD, gates_TE)


class LoopingWithBias(LoopingExperts):
    """The same with a selection bias."""

    bias_name = "gate_bias"

    def scores(self, x_TD):
        return self.gate(x_TD).sigmoid()

    def choose(self, scores_TE):
        return (scores_TE + self.gate_bias).topk(self.k)[1]

    weigh = Wild.weigh


class OddlyNamedBias(Wild):
    """A bias as a Parameter without a telling name, under ``no_grad``."""

    bias_name = "zeta"

    def __init__(self):
        super().__init__()
        self.zeta = nn.Parameter(torch.zeros(E), requires_grad=False)

    def choose(self, scores_TE):
        with torch.no_grad():
            return torch.topk(scores_TE + self.zeta.unsqueeze(0), self.k, dim=-1)[1]


class BiasInChild(Wild):
    """ERNIE: a child adds a bias of shape (1, E)."""

    bias_name = "amount"

    class Statics(nn.Module):
        def __init__(self):
            super().__init__()
            self.amount = nn.Parameter(torch.zeros(1, E), requires_grad=False)

        def forward(self, scores):
            return scores + self.amount.squeeze()

    def __init__(self):
        super().__init__()
        self.statics = self.Statics()

    def choose(self, scores_TE):
        return self.statics(scores_TE).topk(self.k).indices


class BiasAsArgument(Block):
    """torchtitan: a router module that the block hands its bias, a buffer."""

    list_name = "experts"
    bias_name = "nudge"

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(D, E, bias=False)

        def forward(self, x_TD, nudge=None):
            scores_TE = self.lin(x_TD).sigmoid().float()
            ranked_TE = scores_TE if nudge is None else scores_TE + nudge
            _, ids_TK = torch.topk(ranked_TE, k=2, dim=1, sorted=False)
            weights_TK = scores_TE.gather(1, ids_TK)
            counts_E = torch.histc(ids_TK.float(), bins=E, min=0, max=E)
            return weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20), ids_TK, counts_E

    def __init__(self):
        super().__init__()
        self.router = self.Gate()
        self.register_buffer("nudge", None if self.bias_name is None else torch.zeros(E))
        self.register_buffer("tokens_per_expert", torch.zeros(E), persistent=False)

    def forward(self, x):
        weights_TK, ids_TK, counts_E = self.router(x.reshape(-1, D), self.nudge)
        with torch.no_grad():
            self.tokens_per_expert.add_(counts_E)
        return self.mix(x, weights_TK, ids_TK)

    def scores(self, x_TD):
        return self.router.lin(x_TD).sigmoid()

    def weigh(self, scores_TE, ids_TK):
        chosen_TK = scores_TE.gather(1, ids_TK)
        return chosen_TK / chosen_TK.sum(-1, keepdim=True)


class ArgumentLeftOut(BiasAsArgument):
    """The same without the bias."""

    bias_name = None
