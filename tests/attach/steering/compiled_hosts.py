"""Blocks that a compiler takes apart at different places; all compute the same function.

Shape legend: T tokens, D model width, E experts, K experts selected per token.
"""

from __future__ import annotations

import torch
from torch import nn

D, E, K = 8, 6, 2


class Whole(nn.Module):
    """Selects and computes in one graph, by dense experts."""

    k = K

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.top_k = E, self.k
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x):
        x_TD = x.reshape(-1, D)
        return x + self.combine(x_TD, *self.select(self.scores(x_TD))).view_as(x)

    def scores(self, x_TD):
        return self.gate(x_TD).softmax(-1)

    def select(self, scores_TE):
        return scores_TE.topk(self.k)

    def combine(self, x_TD, weights_TK, ids_TK):
        gates_TE = torch.zeros(len(x_TD), E, dtype=weights_TK.dtype).scatter(1, ids_TK, weights_TK)
        outputs_TED = torch.stack([expert(x_TD) for expert in self.experts], 1)
        return (gates_TE.unsqueeze(-1) * outputs_TED).sum(1)


class Unique(Whole):
    def combine(self, x_TD, weights_TK, ids_TK):
        y_TD = torch.zeros_like(x_TD)
        for e in ids_TK.unique():
            chosen_TK = ids_TK == e
            y_TD = y_TD + (weights_TK * chosen_TK).sum(-1, keepdim=True) * self.experts[int(e)](x_TD)
        return y_TD


class ToList(Whole):
    def combine(self, x_TD, weights_TK, ids_TK):
        y_TD = torch.zeros_like(x_TD)
        for e, load in enumerate(torch.bincount(ids_TK.flatten(), minlength=E).tolist()):
            if load:
                chosen_TK = ids_TK == e
                y_TD = y_TD + (weights_TK * chosen_TK).sum(-1, keepdim=True) * self.experts[e](x_TD)
        return y_TD


class Nonzero(Whole):
    def combine(self, x_TD, weights_TK, ids_TK):
        y_TD = torch.zeros_like(x_TD)
        for e, expert in enumerate(self.experts):
            tokens_N, slots_N = (ids_TK == e).nonzero(as_tuple=True)
            y_ND = weights_TK[tokens_N, slots_N, None] * expert(x_TD[tokens_N])
            y_TD = y_TD.index_add(0, tokens_N, y_ND)
        return y_TD


class BreakBefore(Whole):
    def select(self, scores_TE):
        if scores_TE.isnan().any().item():
            raise ValueError("the input is not a number")
        return super().select(scores_TE)


class BreakBeforeAndAfter(BreakBefore, Unique):
    pass


class Rounds(Whole):
    """Argmax twice, with a break between the two."""

    def select(self, scores_TE):
        first_T = scores_TE.argmax(-1)
        self.pause()
        left_TE = scores_TE.scatter(1, first_T.unsqueeze(-1), -torch.inf)
        ids_TK = torch.stack([first_T, left_TE.argmax(-1)], -1)
        return scores_TE.gather(1, ids_TK), ids_TK

    def pause(self):
        torch._dynamo.graph_break()


class UnbrokenRounds(Rounds):
    def pause(self):
        pass


class RanksTwice(Whole):
    """Takes its gate weights from a second ranking, of other scores."""

    k = 1

    def forward(self, x):
        x_TD = x.reshape(-1, D)
        logits_TE = self.gate(x_TD)
        ids_T = logits_TE.argmax(-1)
        self.pause(ids_T)
        weights_T = logits_TE.softmax(-1).max(-1).values
        return x + self.combine(x_TD, weights_T.unsqueeze(-1), ids_T.unsqueeze(-1)).view_as(x)

    def pause(self, ids_T):
        pass


class RanksTwiceBroken(RanksTwice):
    def pause(self, ids_T):
        if ids_T.max().item() >= E:
            raise ValueError("no such expert")


class Owns(Whole):
    """DeepSeek-V3 style: the model's own correction bias."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("e_score_correction_bias", torch.zeros(E))

    def scores(self, x_TD):
        return self.gate(x_TD).sigmoid()

    def select(self, scores_TE):
        ids_TK = (scores_TE + self.e_score_correction_bias).topk(self.k).indices
        return scores_TE.gather(1, ids_TK), ids_TK


class OwnsBroken(Owns, Unique):
    pass


class Router(nn.Module):
    """A router of its own module, called by `Apart`."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.top_k = E, K
        self.gate = nn.Linear(D, E, bias=False)

    def forward(self, x_TD):
        return self.gate(x_TD).softmax(-1).topk(K)


class Experts(nn.Module):
    """The experts of `Apart`."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x_TD, weights_TK, ids_TK):
        gates_TE = torch.zeros(len(x_TD), E, dtype=weights_TK.dtype).scatter(1, ids_TK, weights_TK)
        return (gates_TE.unsqueeze(-1) * torch.stack([each(x_TD) for each in self.all], 1)).sum(1)


class Apart(nn.Module):
    """A router and experts in modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = Router(), Experts()

    def forward(self, x_TD):
        return x_TD + self.experts(x_TD, *self.router(x_TD))


class Model(nn.Module):
    """A model of some blocks."""

    def __init__(self, block: type[nn.Module] = Whole, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x_TD):
        for layer in self.layers:
            x_TD = layer(x_TD)
        return x_TD


def expected(block, x_TD, bias_E):
    """Return the output (T, D) of a block and its counts (E,) with a bias, token by token."""
    counts, rows = [0] * E, []
    for x_D in x_TD:
        plain_E = block.gate(x_D)
        gates_E = plain_E.sigmoid() if isinstance(block, Owns) else plain_E.softmax(-1)
        ranked = plain_E if isinstance(block, RanksTwice) else gates_E
        sums = (ranked + bias_E).tolist()
        chosen = sorted(range(E), key=lambda e: -sums[e])[: block.k]
        for e in chosen:
            counts[e] += 1
        rows.append(x_D + sum(gates_E[e] * block.experts[e](x_D) for e in chosen))
    return torch.stack(rows), counts
