"""Blocks that select experts where no bias can be added, and modules that rank something else than experts.

Shape legend: T tokens, D model width, E experts, K selected per token, H heads, B batch, S sequence, G groups.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tests.attach.discovery.wild_block import D, E, Wild
from tests.attach.discovery.wild_places import WithRouter


class KthValue(Wild):
    def gates(self, scores_TE):
        smallest_T1 = scores_TE.kthvalue(E - self.k + 1, dim=-1, keepdim=True).values
        return torch.where(scores_TE >= smallest_T1, scores_TE, 0.0)


class ThresholdOfTopk(Wild):
    """The ids that topk returns are not used, but its smallest value."""

    def gates(self, scores_TE):
        values, _ = scores_TE.topk(self.k)
        return scores_TE.masked_fill(scores_TE < values[..., -1, None], 0.0)


class Sampled(Wild):
    def choose(self, scores_TE):
        return torch.multinomial(scores_TE, self.k)


class Gumbel(Wild):
    k = 1

    def gates(self, scores_TE):
        return functional.gumbel_softmax(scores_TE.log(), hard=True) * scores_TE


class TopPairs(Wild):
    """Two of all, then one of those left: which of the calls selects is not clear."""

    k = 3

    def choose(self, scores_TE):
        first = scores_TE.topk(2).indices
        return torch.cat([first, scores_TE.scatter(1, first, -1.0).topk(1).indices], dim=1)


NEED_ADAPTER = {
    KthValue: "selects experts by kthvalue",
    ThresholdOfTopk: "selects experts by comparing scores with the k-th largest",
    Sampled: "selects experts by multinomial",
    Gumbel: "selects experts by gumbel_softmax",
    TopPairs: "selects experts by 2 calls of topk, one after another",
}
"""What an adapter of the method ``gates`` can balance, and the error without one."""


class Dense(Wild):
    """All experts for every token."""

    def gates(self, scores_TE):
        return scores_TE


class TopP(Wild):
    """As many experts as it takes."""

    def gates(self, scores_TE):
        values, order = scores_TE.sort(-1, descending=True)
        kept = (values.cumsum(-1) - values) < 0.5
        return torch.zeros_like(scores_TE).scatter(1, order, values * kept)


class HeadwiseExperts(nn.Module):
    """SwitchHead: every head has its own experts, for which one bias is too few."""

    def __init__(self):
        super().__init__()
        self.select, self.experts = nn.Linear(D, 4 * E), nn.Parameter(torch.randn(4, E, D, D))

    def forward(self, x):
        scores_HE = self.select(x).unflatten(-1, (4, E)).sigmoid()
        values, ids = scores_HE.topk(2)
        return torch.einsum(
            "...d,hedf,...he->...f", x, self.experts, torch.zeros_like(scores_HE).scatter(-1, ids, values)
        )


DOUBTFUL = (Dense, TopP, HeadwiseExperts)
"""What looks like a block of experts, and was not seen to select any."""


class ExpertChoice(nn.Module):
    """Experts choose tokens: balanced by construction."""

    def __init__(self):
        super().__init__()
        self.num_experts, self.gate = E, nn.Linear(D, E)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x):
        x_TD = x.reshape(-1, D)
        values, tokens = self.gate(x_TD).softmax(-1).topk(2, dim=0)
        out = torch.zeros_like(x_TD)
        for chosen, weights, expert in zip(tokens.T, values.T, self.experts, strict=True):
            out = out.index_add(0, chosen, expert(x_TD[chosen]) * weights[:, None])
        return out.view_as(x)


class DepthRouter(nn.Module):
    """Mixture of depths: tokens are ranked, not experts."""

    def __init__(self):
        super().__init__()
        self.router, self.block = nn.Linear(D, 1), nn.Linear(D, D)

    def forward(self, x):
        values, tokens = self.router(x).squeeze(-1).topk(3, dim=1)
        index = tokens.unsqueeze(-1).expand(-1, -1, D)
        return x.scatter_add(1, index, self.block(x.gather(1, index)) * values.unsqueeze(-1))


class SparseAutoencoder(nn.Module):
    """Keeps the largest features."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(D, 32), nn.Linear(32, D)

    def forward(self, x):
        kept = self.encode(x).topk(4, dim=-1)
        return self.decode(torch.zeros(*x.shape[:-1], 32).scatter(-1, kept.indices, kept.values))


class Classifier(nn.Module):
    """As many layers as classes, of which it returns the likeliest."""

    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(D, D) for _ in range(2)), nn.Linear(D, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        logits = self.head(x)
        return {"logits": logits, "confidence": logits.max(-1).values, "class": logits.argmax(-1)}


class Codebooks(nn.Module):
    """Residual vector quantisation: the nearest of 16 codes."""

    class Codes(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.randn(16, D))

        def forward(self, x):
            return self.codes[(x.unsqueeze(-2) - self.codes).square().sum(-1).argmin(-1)]

    def __init__(self):
        super().__init__()
        self.books = nn.ModuleList(self.Codes() for _ in range(4))

    def forward(self, x):
        return sum(book(x) for book in self.books)


class Memory(nn.Module):
    """The nearest neighbours among stored keys."""

    def __init__(self):
        super().__init__()
        self.keys, self.values = nn.Parameter(torch.randn(20, D)), nn.Parameter(torch.randn(20, D))

    def forward(self, x):
        weights, ids = (x @ self.keys.T).topk(4)
        return (weights.softmax(-1).unsqueeze(-1) * self.values[ids]).sum(-2)


class Beams(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(D, D) for _ in range(4)), nn.Linear(D, 50)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x).topk(4).indices


NO_ROUTERS = {
    DepthRouter: "Modules that call topk: 0: DepthRouter.",
    SparseAutoencoder: "Modules that call topk: 0: SparseAutoencoder.",
    Classifier: "'0': Classifier looks like a block of experts, but was not seen to select any.",
    Codebooks: "Modules that call topk: none.",
    Memory: "Modules that call topk: 0: Memory.",
    Beams: "Modules that call topk: 0: Beams.",
}
"""What ranks something else than experts, and the error if there is no router either."""


class Gate(nn.Module):
    """A gate in the style of lucidrains' mixture-of-experts; ``groups`` of them in one if there are gates above it."""

    def __init__(self, *groups):
        super().__init__()
        self.num_gates = 4
        self.weight = nn.Parameter(torch.randn(*groups, D, self.num_gates))

    def forward(self, x):
        scores = (x @ self.weight).softmax(-1)
        values, ids = scores.topk(2)
        return torch.zeros_like(scores).scatter(-1, ids, values)


class Hierarchical(nn.Module):
    """Gates inside gates: four groups of four experts, and a gate for each group."""

    def __init__(self):
        super().__init__()
        self.outer, self.inner = Gate(), Gate(4)
        self.experts = nn.ParameterList([torch.randn(4, D, D)])

    def forward(self, x_BSD):
        x_TD = x_BSD.flatten(0, 1)
        outer_TG = self.outer(x_TD)
        inner_GTE = self.inner(x_TD.expand(4, *x_TD.shape))
        gates_TE = torch.einsum("tg,gte->te", outer_TG, inner_GTE)
        return torch.einsum("td,edh,te->th", x_TD, self.experts[0], gates_TE).view_as(x_BSD)


class HostMovesItsBias(Wild):
    """Balances itself in its own forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("expert_bias", torch.zeros(E))

    def choose(self, scores_TE):
        ids_TK = (scores_TE + self.expert_bias).topk(self.k).indices
        self.move_(functional.one_hot(ids_TK, E).sum((0, 1)))
        return ids_TK

    def move_(self, counts_E):
        with torch.no_grad():
            self.expert_bias += 1e-3 * (counts_E.float().mean() - counts_E).sign()


class HostReplacesItsBias(HostMovesItsBias):
    def move_(self, counts_E):
        self.expert_bias = self.expert_bias + 1e-3 * (counts_E.float().mean() - counts_E).sign()


class Checkpointed(Wild):
    """Recomputes the choice in backward, which its caller cannot see."""

    reentrant = False

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class WholeModel(WithRouter):
    """Embedding, experts and head in one module, called with token ids."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, D), nn.Linear(D, 50)

    def forward(self, ids_BS):
        return self.head(super().forward(self.embedding(ids_BS)))
