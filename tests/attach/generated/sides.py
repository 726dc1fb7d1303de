"""What routers do next to routing: they rank again, look at ids in Python, and leave things behind.

Shape legend: T tokens, E experts, K experts selected per token.
"""

from __future__ import annotations

import torch
from torch.distributions import Normal
from torch.nn import functional

LEFT: list[torch.Tensor] = []
"""A manager of auxiliary losses, as a module keeps it globally."""
CACHE: dict[str, object] = {}
"""Things made at the first call."""


def _switch_loss(self, logits_TE, scores_TE, k):
    probs_TE = logits_TE.softmax(-1)
    hot_TE = functional.one_hot(probs_TE.argmax(dim=-1), probs_TE.shape[-1]).float()
    self.aux_loss = probs_TE.shape[-1] * (hot_TE.mean(0) * probs_TE.mean(0)).sum()


def _logged_max(self, logits_TE, scores_TE, k):
    self.confidence = logits_TE.softmax(-1).max(dim=-1).values.mean().detach()


def _same_again(self, logits_TE, scores_TE, k):
    hot_TE = torch.zeros_like(scores_TE).scatter(1, scores_TE.topk(k, dim=-1).indices, 1.0)
    self.aux_loss = (hot_TE.mean(0) * scores_TE.mean(0)).sum()


def _load_loss(self, logits_TE, scores_TE, k):
    threshold_T1 = scores_TE.topk(k + 1, dim=-1).values[:, k, None]
    self.aux_loss = (scores_TE - threshold_T1).sigmoid().sum(0).float().var()


SECONDS = {
    "none": lambda self, logits, scores, k: None,
    "switch loss": _switch_loss,
    "logged max": _logged_max,
    "same again": _same_again,
    "load loss": _load_loss,
    "values of topk": lambda self, logits, scores, k: logits.softmax(-1).topk(k, dim=-1)[0],
    "values of max": lambda self, logits, scores, k: logits.softmax(-1).max(dim=-1).values.unsqueeze(-1),
}


def _unique(self, ids_TK):
    self.num_hit = ids_TK.unique().numel()


def _nonzero(self, ids_TK):
    self.num_hit = len((ids_TK == 0).nonzero())


def _tolist(self, ids_TK):
    self.num_hit = len(set(ids_TK[:, 0].tolist()))


def _item(self, ids_TK):
    if ids_TK.max().item() < 0:
        raise IndexError("no expert has this number")


LOOKS = {
    "none": lambda self, ids_TK: None,
    "unique": _unique,
    "nonzero": _nonzero,
    "tolist": _tolist,
    "item": _item,
}


def _manager(self, logits_TE):
    LEFT.append(logits_TE.detach().logsumexp(-1).mean())


def _cached_tensor(self, logits_TE):
    if "range" not in CACHE:
        CACHE["range"] = torch.arange(logits_TE.shape[-1], device=logits_TE.device)


def _cached_distribution(self, logits_TE):
    if "normal" not in CACHE:
        CACHE["normal"] = Normal(torch.zeros_like(logits_TE[0, :1]), torch.ones_like(logits_TE[0, :1]))


def _calls(self, logits_TE):
    self.calls = getattr(self, "calls", 0) + 1


def _last_logits(self, logits_TE):
    self.last_logits = logits_TE.detach()


EFFECTS = {
    "none": lambda self, logits_TE: None,
    "manager": _manager,
    "cached tensor": _cached_tensor,
    "cached distribution": _cached_distribution,
    "calls": _calls,
    "last logits": _last_logits,
}
