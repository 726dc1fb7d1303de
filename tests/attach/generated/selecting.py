"""Steps from scores to experts and their gate weights, as public code writes them.

Shape legend: T tokens, E experts, K experts selected per token.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from tests.attach.generated.scoring import softmax_by_hand


def _cut(ordered, part):
    values, ids = ordered
    return values[..., part], ids[..., part]


def _with_values(scores_TE, ids_TK):
    return scores_TE.gather(-1, ids_TK), ids_TK


def _argmax(self, scores_TE, k):
    ids_T = torch.argmax(scores_TE, dim=-1)
    return _with_values(scores_TE, ids_T.unsqueeze(-1))


def _max(self, scores_TE, k):
    values_T, ids_T = scores_TE.max(dim=-1)
    return values_T.unsqueeze(-1), ids_T.unsqueeze(-1)


def _argmax_of_one_hot(self, scores_TE, k):
    hot_TE = functional.one_hot(scores_TE.argmax(-1), scores_TE.shape[-1])
    return _with_values(scores_TE, hot_TE.argmax(-1, keepdim=True))


def _argmax_in_rounds(self, scores_TE, k):
    left_TE, ids = scores_TE, []
    for _ in range(k):
        ids.append(left_TE.argmax(-1))
        left_TE = left_TE.masked_fill(functional.one_hot(ids[-1], scores_TE.shape[-1]).bool(), float("-inf"))
    return _with_values(scores_TE, torch.stack(ids, dim=-1))


def _argmax_times_zero(self, scores_TE, k):
    left_TE, ids = scores_TE, []
    for _ in range(k):
        ids.append(left_TE.argmax(-1))
        left_TE = left_TE * (1 - functional.one_hot(ids[-1], scores_TE.shape[-1]))
    return _with_values(scores_TE, torch.stack(ids, dim=-1))


def _max_in_rounds(self, scores_TE, k):
    left_TE, picks = scores_TE, []
    for _ in range(k):
        picks.append(torch.max(left_TE, dim=-1, keepdim=True))
        left_TE = left_TE.scatter(-1, picks[-1][1], float("-inf"))
    return tuple(torch.cat(column, dim=-1) for column in zip(*picks, strict=True))


def _chunks(self, scores_TE, k):
    parts = [part.topk(k, dim=-1) for part in scores_TE.chunk(2)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _transposed(self, scores_TE, k):
    values_KT, ids_KT = scores_TE.t().topk(k, dim=0)
    return values_KT.t(), ids_KT.t()


SELECTS = {
    "torch.topk": lambda self, scores, k: torch.topk(scores, k, dim=-1),
    "Tensor.topk": lambda self, scores, k: scores.topk(k),
    "topk of keywords": lambda self, scores, k: torch.topk(input=scores, k=k, dim=1),
    "topk unsorted": lambda self, scores, k: scores.topk(k=k, dim=-1, sorted=False),
    "sort": lambda self, scores, k: _cut(torch.sort(scores, dim=-1, descending=True), slice(k)),
    "argsort": lambda self, scores, k: _with_values(scores, scores.argsort(dim=-1, descending=True)[:, :k]),
    "end of sort": lambda self, scores, k: _cut(scores.sort(dim=-1), slice(-k, None)),
    "end of argsort": lambda self, scores, k: _with_values(scores, torch.argsort(scores, dim=-1)[:, -k:]),
    "argsort of negative": lambda self, scores, k: _with_values(scores, (-scores).argsort(dim=-1)[:, :k]),
    "argmax": _argmax,
    "max": _max,
    "argmax of one_hot": _argmax_of_one_hot,
    "argmax in rounds": _argmax_in_rounds,
    "argmax times zero": _argmax_times_zero,
    "max in rounds": _max_in_rounds,
    "candidates": lambda self, scores, k: _cut(scores.topk(k + 1, dim=-1), slice(k)),
    "chunks": _chunks,
    "transposed": _transposed,
    "multinomial": lambda self, scores, k: _with_values(scores, torch.multinomial(scores, k)),
}


def _threshold(self, scores_TE, k):
    lowest_T1 = scores_TE.topk(k, dim=-1).values[:, -1:]
    return torch.where(scores_TE >= lowest_T1, scores_TE, torch.zeros_like(scores_TE))


def _expert_choice(self, scores_TE, k):
    values_CE, tokens_CE = scores_TE.topk(len(scores_TE) * k // scores_TE.shape[-1], dim=0)
    return torch.zeros_like(scores_TE).scatter(0, tokens_CE, values_CE)


MAPS = {
    "threshold": _threshold,
    "expert choice": _expert_choice,
    "gumbel": lambda self, scores, k: functional.gumbel_softmax(scores, hard=True),
}
"""Ways to make a map (T, E) of gate weights without ids."""

GATES = {
    "values": lambda values, ids, scores, logits: values,
    "softmax": lambda values, ids, scores, logits: values.softmax(-1),
    "softmax by hand": lambda values, ids, scores, logits: softmax_by_hand(values),
    "normalised": lambda values, ids, scores, logits: values / (values.sum(-1, keepdim=True) + 1e-9),
    "gathered": lambda values, ids, scores, logits: scores.gather(-1, ids),
    "gathered from softmax": lambda values, ids, scores, logits: logits.softmax(-1).gather(-1, ids),
    "gathered from softmax by hand": lambda values, ids, scores, logits: softmax_by_hand(logits).gather(
        -1, ids
    ),
}
