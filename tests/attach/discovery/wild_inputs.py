"""Routers that differ in what they receive and in what a choice is made for; see `wild_block`.

Shape legend: B batch, S sequence, H height, W width, T tokens, D model width, E experts, K experts selected per token,
R rows.
"""

from __future__ import annotations

import torch
from torch import nn

from tests.attach.discovery.wild_block import Block, D, E, K, Wild


class Conditioned(Block):
    """A diffusion transformer: the time step takes part in the routing."""

    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.time = nn.Linear(D, E), nn.Linear(D, E)

        def forward(self, x_BSD, time_BD):
            return (self.gate(x_BSD) + self.time(time_BD).unsqueeze(1)).softmax(-1).reshape(-1, E).topk(K)

    def __init__(self):
        super().__init__()
        self.router = self.Router()

    def also(self, x):
        return (x.new_ones(len(x), D),)

    def forward(self, x, time_BD):
        return self.mix(x, *self.router(x, time_BD))

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
        return self.output(x, self.gates(self.task_gates[task](x.reshape(-1, D)).softmax(-1)))

    def scores(self, x_TD):
        return self.task_gates[1](x_TD).softmax(-1)


class PerSentence(Wild):
    """One choice for a whole sequence, from its mean."""

    rows = "sequences"

    def rows_of(self, x):
        return x.mean(1)

    def output(self, x, gates_BE):
        outputs_BSED = self.outputs(x.reshape(-1, D)).view(*x.shape[:2], E, D)
        return (gates_BE[:, None, :, None] * outputs_BSED).sum(2)


class SubTokens(Wild):
    """Multi-head: every token is cut in two, and each half routed."""

    rows = "halves"

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D // 2, E)

    def make_experts(self):
        return nn.ModuleList(nn.Linear(D // 2, D // 2) for _ in range(E))

    def rows_of(self, x):
        return x.reshape(-1, D // 2)


class Images(Block):
    """Convolutions as experts, chosen per image by its mean: (B, S, D) is read as B images of D channels."""

    rows = "sequences"

    class Moe(Wild):
        def make_experts(self):
            return nn.ModuleList(nn.Conv2d(D, D, 3, padding=1) for _ in range(E))

        def rows_of(self, x_BDHW):
            return x_BDHW.mean((2, 3))

        def output(self, x_BDHW, gates_BE):
            outputs_BEDHW = torch.stack([conv(x_BDHW) for conv in self.ffns], dim=1)
            return (gates_BE[:, :, None, None, None] * outputs_BEDHW).sum(1)

    def __init__(self):
        nn.Module.__init__(self)
        self.moe = self.Moe()

    def forward(self, x):
        return self.moe(self.images(x)).flatten(2).transpose(1, 2)

    def images(self, x):
        return x.transpose(1, 2).unflatten(2, (2, -1))

    def rows_of(self, x):
        return self.moe.rows_of(self.images(x))

    def scores(self, x_RD):
        return self.moe.scores(x_RD)

    def output(self, x, gates_RE):
        return self.moe.output(self.images(x), gates_RE).flatten(2).transpose(1, 2)


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

        def rows_of(self, x_BDHW):
            return x_BDHW.permute(0, 2, 3, 1).reshape(-1, D)

        def scores(self, x_RD):
            return (x_RD @ self.gate.weight.view(E, D).T + self.gate.bias).softmax(-1)

        def output(self, x_BDHW, gates_RE):
            gates_BHWE = gates_RE.view(len(x_BDHW), *x_BDHW.shape[2:], E)
            each = [gates_BHWE[..., e].unsqueeze(1) * conv(x_BDHW) for e, conv in enumerate(self.ffns)]
            return torch.stack(each).sum(0)


class OtherKInEvaluation(Wild):
    """Uses one expert more in training than in evaluation."""

    def choose(self, scores_TE):
        return scores_TE.topk(self.k if self.training else self.k - 1).indices


class NullExperts(Wild):
    """More places than experts: a token sent to one of the last places skips the experts."""

    places = E + 2

    def __init__(self):
        super().__init__()
        self.num_experts, self.gate = E, nn.Linear(D, E + 2)

    def combine(self, x_TD, gates_TE):
        return super().combine(x_TD, gates_TE[:, :E])


class Sinkhorn(Wild):
    """Evens the scores out in a loop that lasts as long as the data say."""

    def scores(self, x_TD):
        even_TE, error = self.gate(x_TD).sigmoid(), torch.ones(())
        while error > 0.1:
            rows_TE = even_TE / even_TE.sum(1, keepdim=True)
            even_TE = rows_TE / rows_TE.sum(0, keepdim=True) * (len(x_TD) / E)
            error = (even_TE - rows_TE).abs().mean()
        return even_TE
