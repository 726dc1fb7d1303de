"""Routers as they are written in public code, which differ in where experts and router are, and in what they are told.

See `wild_styles`. Shape legend: B batch, S sequence, T tokens, D model width, E experts, K experts selected per token.
"""

from __future__ import annotations

import dataclasses
import types

import torch
from torch import nn

from tests.attach.discovery.wild_styles import D, E, K, Wild

# Where experts and router are kept.


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


class LowRankExperts(Wild):
    """LoRA experts beside a frozen matrix."""

    def make_experts(self):
        self.base = nn.Linear(D, D).requires_grad_(False)
        self.lora_b = nn.ModuleList(nn.Linear(2, D, bias=False) for _ in range(E))
        return nn.ModuleList(nn.Linear(D, 2, bias=False) for _ in range(E))

    def combine(self, x_TD, gates_TE):
        low = [b(a(x_TD)) for a, b in zip(self.ffns, self.lora_b, strict=True)]
        return self.base(x_TD) + (gates_TE.unsqueeze(-1) * torch.stack(low, dim=1)).sum(1)


class TopKLayer(nn.Module):
    """A selection as a module without parameters."""

    def forward(self, scores_TE):
        return scores_TE.topk(K)


class InSequential(Wild):
    """The router is a Sequential that ends in a selecting layer."""

    def __init__(self):
        super().__init__()
        self.router = nn.Sequential(nn.Sequential(nn.Linear(D, E), nn.Softmax(-1)), TopKLayer())

    def scores(self, x_TD):
        return self.router[0](x_TD)

    def forward(self, x):
        values, ids = self.router(x.reshape(-1, D))
        gates_TE = values.new_zeros(len(ids), E).scatter(1, ids, values)
        return self.combine(x.reshape(-1, D), gates_TE).view_as(x)


class MethodRouter(nn.Module):
    """Is never called as a module."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, E)

    def route(self, x_TD):
        return self.gate(x_TD).softmax(-1).topk(K)


class ByMethod(InSequential):
    def __init__(self):
        Wild.__init__(self)
        self.router = MethodRouter()

    def scores(self, x_TD):
        return self.router.gate(x_TD).softmax(-1)

    def forward(self, x):
        values, ids = self.router.route(x.reshape(-1, D))
        gates_TE = values.new_zeros(len(ids), E).scatter(1, ids, values)
        return self.combine(x.reshape(-1, D), gates_TE).view_as(x)


class ForwardRouter(MethodRouter):
    def forward(self, x_TD):
        return self.route(x_TD)


class CalledTwice(ByMethod):
    """Tokens of two kinds go through the router one after the other."""

    def __init__(self):
        super().__init__()
        self.router = ForwardRouter()

    def forward(self, x):
        x_TD = x.reshape(-1, D)
        parts = [self.router(part_TD) for part_TD in x_TD.chunk(2)]
        values, ids = (torch.cat(each) for each in zip(*parts, strict=True))
        gates_TE = values.new_zeros(len(ids), E).scatter(1, ids, values)
        return self.combine(x_TD, gates_TE).view_as(x)


class ForwardByName(ByMethod):
    """``router.forward(...)``, past the hooks."""

    def __init__(self):
        super().__init__()
        self.router = ForwardRouter()

    def forward(self, x):
        values, ids = self.router.forward(x.reshape(-1, D))
        gates_TE = values.new_zeros(len(ids), E).scatter(1, ids, values)
        return self.combine(x.reshape(-1, D), gates_TE).view_as(x)


# What the router is told besides the hidden states.


class Conditioned(Wild):
    """A diffusion transformer: the time step takes part in the routing."""

    def __init__(self):
        super().__init__()
        self.router = self.Router()

    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.time = nn.Linear(D, E), nn.Linear(D, E)

        def forward(self, x_BSD, time_BD):
            return (self.gate(x_BSD) + self.time(time_BD).unsqueeze(1)).softmax(-1).reshape(-1, E).topk(K)

    def also(self, x):
        return (x.new_ones(len(x), D),)

    def forward(self, x, time_BD):
        values, ids = self.router(x, time_BD)
        gates_TE = values.new_zeros(len(ids), E).scatter(1, ids, values)
        return self.combine(x.reshape(-1, D), gates_TE).view_as(x)

    def scores(self, x_TD):
        return (self.router.gate(x_TD) + self.router.time(torch.ones(D))).softmax(-1)


class TaskGates(Wild):
    """One gate per task, the task a number that the caller gives."""

    def __init__(self):
        super().__init__()
        self.task_gates = nn.ModuleList(nn.Linear(D, E) for _ in range(3))

    def also(self, x):
        return (1,)

    def forward(self, x, task):
        x_TD = x.reshape(-1, D)
        return self.combine(x_TD, self.gates(self.task_gates[task](x_TD).softmax(-1))).view_as(x)

    def scores(self, x_TD):
        return self.task_gates[1](x_TD).softmax(-1)


class PerSentence(Wild):
    """One choice for a whole sequence, from its mean."""

    rows = "sequences"

    def forward(self, x):
        gates_BE = self.gates(self.scores(x.mean(1)))
        return (gates_BE[:, None, :, None] * self.outputs(x.reshape(-1, D)).view(*x.shape[:2], E, D)).sum(2)

    def reference(self, x, bias_E):
        scores_BE = self.scores(x.mean(1))
        ids_BK = (scores_BE + bias_E).topk(self.k).indices
        gates_BE = torch.zeros_like(scores_BE).scatter(1, ids_BK, scores_BE.gather(1, ids_BK))
        return (gates_BE[:, None, :, None] * self.outputs(x.reshape(-1, D)).view(*x.shape[:2], E, D)).sum(2)


class Images(Wild):
    """Convolutions as experts, chosen per image by its mean: (B, S, D) is read as B images of D channels."""

    rows = "sequences"

    class Moe(Wild):
        def forward(self, x_BDHW):
            gates_BE = self.gates(self.scores(x_BDHW.mean((2, 3))))
            return self.mix(x_BDHW, gates_BE)

        def mix(self, x_BDHW, gates_BE):
            outputs_BEDHW = torch.stack([conv(x_BDHW) for conv in self.ffns], dim=1)
            return (gates_BE[:, :, None, None, None] * outputs_BEDHW).sum(1)

        def make_experts(self):
            return nn.ModuleList(nn.Conv2d(D, D, 3, padding=1) for _ in range(E))

    def __init__(self):
        nn.Module.__init__(self)
        self.moe = self.Moe()

    def forward(self, x):
        return self.moe(self.as_images(x)).flatten(2).transpose(1, 2)

    def as_images(self, x):
        return x.transpose(1, 2).unflatten(2, (2, -1))

    def reference(self, x, bias_E):
        images = self.as_images(x)
        scores_BE = self.moe.scores(images.mean((2, 3)))
        ids_BK = (scores_BE + bias_E).topk(self.k).indices
        gates_BE = torch.zeros_like(scores_BE).scatter(1, ids_BK, scores_BE.gather(1, ids_BK))
        return self.moe.mix(images, gates_BE).flatten(2).transpose(1, 2)


class Pixels(Images):
    """Chosen per pixel, by a convolution: scores (B, E, H, W)."""

    rows = "tokens"

    class Moe(Images.Moe):
        def __init__(self):
            super().__init__()
            self.gate = nn.Conv2d(D, E, 1)

        def forward(self, x_BDHW):
            scores = self.gate(x_BDHW).softmax(1)
            values, ids = scores.topk(K, dim=1)
            gates = torch.zeros_like(scores).scatter(1, ids, values)
            return (gates.unsqueeze(2) * torch.stack([conv(x_BDHW) for conv in self.ffns], dim=1)).sum(1)

    def reference(self, x, bias_E):
        images = self.as_images(x)
        scores = self.moe.gate(images).softmax(1)
        ids = (scores + bias_E[:, None, None]).topk(self.k, dim=1).indices
        gates = torch.zeros_like(scores).scatter(1, ids, scores.gather(1, ids))
        outputs = torch.stack([conv(images) for conv in self.moe.ffns], dim=1)
        return (gates.unsqueeze(2) * outputs).sum(1).flatten(2).transpose(1, 2)


class OtherKInEvaluation(Wild):
    """Uses one expert more in training than in evaluation."""

    def choose(self, scores_TE):
        return scores_TE.topk(self.k if self.training else self.k - 1).indices


@dataclasses.dataclass(frozen=True)
class Routed:
    weights: torch.Tensor
    ids: torch.Tensor


class FrozenOutput(Wild):
    """A router whose output is a dataclass, and whose gate has a bias that belongs to the gate weights."""

    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(E, D))
            self.offset = nn.Parameter(torch.randn(E))

        def forward(self, x_TD):
            values, ids = (x_TD @ self.weight.T + self.offset).topk(K)
            return Routed(values.softmax(-1), ids)

    def __init__(self):
        super().__init__()
        self.router = self.Router()

    def scores(self, x_TD):
        return x_TD @ self.router.weight.T + self.router.offset

    def weigh(self, scores_TE, ids_TK):
        return scores_TE.gather(1, ids_TK).softmax(-1)

    def forward(self, x):
        routed = self.router(x.reshape(-1, D))
        gates_TE = routed.weights.new_zeros(len(routed.ids), E).scatter(1, routed.ids, routed.weights)
        return self.combine(x.reshape(-1, D), gates_TE).view_as(x)


class NullExperts(Wild):
    """More places than experts: who is sent to the last, skips."""

    def __init__(self):
        super().__init__()
        self.num_experts, self.gate = E, nn.Linear(D, E + 2)

    def combine(self, x_TD, gates_TE):
        return super().combine(x_TD, gates_TE[:, :E])


class Standardized(Wild):
    """Scores are sharpened and clamped by tensors with one entry per expert."""

    def __init__(self):
        super().__init__()
        self.sharpness = nn.Parameter(torch.rand(E) + 0.5)

    def scores(self, x_TD):
        return (self.gate(x_TD) * self.sharpness).sigmoid()


class Helper(Wild):
    """No selecting name in its code, no expert in its names, and the gate deep in a Sequential."""

    def __init__(self):
        super().__init__()
        self.router = nn.Sequential(
            nn.Sequential(nn.Sequential(nn.Linear(D, E), nn.Softmax(-1)), TopKLayer())
        )

    def scores(self, x_TD):
        return self.router.get_submodule("0.0")(x_TD)

    forward = InSequential.forward


class Sinkhorn(Wild):
    """Evens the scores out in a loop that lasts as long as the data say."""

    def scores(self, x_TD):
        even_TE, error = self.gate(x_TD).sigmoid(), torch.ones(())
        while error > 0.1:
            rows_TE = even_TE / even_TE.sum(1, keepdim=True)
            even_TE = rows_TE / rows_TE.sum(0, keepdim=True) * (len(x_TD) / E)
            error = (even_TE - rows_TE).abs().mean()
        return even_TE


class SubTokens(Wild):
    """Multi-head: every token is cut in two, and each half routed."""

    rows = "halves"

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D // 2, E)

    def make_experts(self):
        return nn.ModuleList(nn.Linear(D // 2, D // 2) for _ in range(E))

    def forward(self, x):
        x_TD = x.reshape(-1, D // 2)
        return self.combine(x_TD, self.gates(self.scores(x_TD))).view_as(x)

    def reference(self, x, bias_E):
        x_TD = x.reshape(-1, D // 2)
        scores_TE = self.scores(x_TD)
        ids_TK = (scores_TE + bias_E).topk(K).indices
        gates_TE = torch.zeros_like(scores_TE).scatter(1, ids_TK, scores_TE.gather(1, ids_TK))
        return self.combine(x_TD, gates_TE).view_as(x)
