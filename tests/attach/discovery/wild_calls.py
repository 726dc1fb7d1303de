"""Routers that differ in how the selecting call is written; see `wild_block`.

Shape legend: S sequence, T tokens, D model width, E experts, K experts selected per token.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from tests.attach.discovery.wild_block import Block, D, K, Wild


class PositionalArguments(Wild):
    def choose(self, scores_TE):
        return torch.topk(scores_TE, self.k, 1, True, False)[1]


class KeywordArguments(Wild):
    def gates(self, scores_TE):
        values, ids = torch.topk(input=scores_TE, k=self.k, dim=-1)
        return torch.zeros_like(scores_TE).scatter(1, ids, values / values.sum(-1, keepdim=True))

    def weigh(self, scores_TE, ids_TK):
        chosen_TK = scores_TE.gather(1, ids_TK)
        return chosen_TK / chosen_TK.sum(-1, keepdim=True)


class _WithoutNames(Block):
    """A block in whose own code no call is named; subclasses say what `top` is."""

    def forward(self, x):
        return self.mix(x, *self.top(self.scores(self.rows_of(x))))


def pick_some(scores_TE, how_many):
    return torch.topk(scores_TE, how_many)


def pick(scores_TE, how_many):
    return pick_some(scores_TE, how_many)


class ByFunction(_WithoutNames):
    """The call is two functions away, k a number in the code."""

    def top(self, scores_TE):
        return pick(scores_TE, 2)


class ByPartial(_WithoutNames):
    top = functools.partial(torch.topk, k=K, dim=-1)


class Chooser:
    """An object that is no module."""

    def __call__(self, scores_TE):
        return scores_TE.topk(2)


class ByObject(_WithoutNames):
    """Its experts make it a candidate."""

    list_name = "experts"
    top = Chooser()


class ByOverload(Wild):
    def choose(self, scores_TE):
        return torch.ops.aten.topk.default(scores_TE, self.k)[1]


class NumpyK(Wild):
    """k comes from numpy."""

    def choose(self, scores_TE):
        return scores_TE.topk(np.int64(self.k)).indices


class UnderAutocast(Wild):
    def choose(self, scores_TE):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=False):
            return super().choose(scores_TE.float())


class PerSequence(Wild):
    """Routes one sequence of the batch after the other."""

    def forward(self, x):
        return torch.stack([super(PerSequence, self).forward(x_SD) for x_SD in x])


class InChunks(Wild):
    def forward(self, x):
        chunks = x.reshape(-1, D).split(8)
        return torch.cat([super(InChunks, self).forward(x_TD) for x_TD in chunks]).view_as(x)


class Batched(Wild):
    """lucidrains: ranks (B, S, E)."""

    def forward(self, x_BSD):
        values_BSK, ids_BSK = self.scores(x_BSD).topk(self.k, dim=-1)
        weights_BSK = values_BSK / values_BSK.sum(-1, keepdim=True).clamp(min=1e-9)
        return self.mix(x_BSD, weights_BSK.flatten(0, 1), ids_BSK.flatten(0, 1))

    weigh = KeywordArguments.weigh
