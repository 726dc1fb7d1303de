"""A block of experts of which routers in many styles are made, and what each must compute.

`Block` does not choose; `Wild` chooses in the plainest way. `reference` and `reference_ids` compute plainly what a bias
must do.

Shape legend: B batch, S sequence, T tokens, D model width, E experts, K experts selected per token, R rows.
"""

from __future__ import annotations

import torch
from torch import nn

D, E, K = 12, 6, 2


class Block(nn.Module):
    """A gate and experts, without the choice; no code of it names a call that selects.

    `scores`, `weigh` and `output` say what a block computes; `reference` computes it from them for any bias.
    """

    k = K
    places = E
    """How many a choice is among: experts, and places for tokens that skip them."""
    rows = "tokens"
    """What one choice is made for: each token, half of one, or a sequence."""
    has_groups = False
    """Whether a choice is among the experts of the best group only."""
    bias_name = None
    """The selection bias that the block has itself."""
    list_name = "ffns"

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        setattr(self, self.list_name, self.make_experts())

    def also(self, x):
        """Return what the model gives the block in addition to the hidden states."""
        return ()

    def make_experts(self):
        return nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def rows_of(self, x):
        return x.reshape(-1, D)

    def scores(self, x_TD):
        return self.gate(x_TD).softmax(-1)

    def ranked(self, scores_TE, bias_E):
        return scores_TE + bias_E

    def weigh(self, scores_TE, ids_TK):
        return scores_TE.gather(1, ids_TK)

    def outputs(self, x_TD):
        """Return all experts' outputs (T, E, D)."""
        return torch.stack([ffn(x_TD) for ffn in getattr(self, self.list_name)], dim=1)

    def combine(self, x_TD, gates_TE):
        return (gates_TE.unsqueeze(-1) * self.outputs(x_TD)).sum(1)

    def output(self, x, gates_TE):
        return self.combine(self.rows_of(x), gates_TE).view_as(x)

    def mix(self, x, weights_TK, ids_TK):
        gates_TE = weights_TK.new_zeros(len(ids_TK), E).scatter(1, ids_TK, weights_TK)
        return self.output(x, gates_TE)


def reference_ids(block, x, bias_E):
    """Return the experts (R, K) that this bias must select."""
    ranked_RE = block.ranked(block.scores(block.rows_of(x)), bias_E)
    return ranked_RE.sort(descending=True, stable=True).indices[:, : block.k]


def reference(block, x, bias_E):
    """Return the output for this bias, with gate weights from unbiased scores."""
    scores_RE, ids_RK = block.scores(block.rows_of(x)), reference_ids(block, x, bias_E)
    gates_RE = torch.zeros_like(scores_RE).scatter(1, ids_RK, block.weigh(scores_RE, ids_RK))
    return block.output(x, gates_RE)


def after_sign(bias_E, counts_E, rate):
    """Return the bias after a step of the rule `Sign`, centred."""
    signs_E = (counts_E.double().mean() - counts_E).sign()
    return bias_E + rate * (signs_E - signs_E.mean()).float()


class Wild(Block):
    """The plainest block; subclasses differ in one thing."""

    def forward(self, x):
        return self.output(x, self.gates(self.scores(self.rows_of(x))))

    def gates(self, scores_TE):
        """Return gate weights (T, E), zero for experts that are not selected."""
        ids_TK = self.choose(scores_TE)
        return torch.zeros_like(scores_TE).scatter(1, ids_TK, self.weigh(scores_TE, ids_TK))

    def choose(self, scores_TE):
        return scores_TE.topk(self.k).indices


class OfLogits(Wild):
    """Ranks logits; the gate weights are a softmax over those selected."""

    def scores(self, x_TD):
        return self.gate(x_TD)

    def weigh(self, scores_TE, ids_TK):
        return scores_TE.gather(1, ids_TK).softmax(-1)
