"""Steps from hidden states to scores, as public code writes them; each is a method of the module that routes.

Shape legend: T tokens, D model width, E experts.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


def _weight(self):
    return self.gate_weight if isinstance(self.gate_weight, nn.Parameter) else self.gate_weight.weight


def _project(self, x_TD):
    gate = self.gate_weight
    return gate(x_TD) if isinstance(gate, nn.Module) else functional.linear(x_TD, gate)


def _cosine(self, x_TD):
    return 3 * functional.linear(
        functional.normalize(x_TD, dim=-1), functional.normalize(_weight(self), dim=-1)
    )


def _noisy(self, x_TD):
    logits_TE = _project(self, x_TD)
    return logits_TE + 0.5 * torch.randn_like(logits_TE) if self.training else logits_TE


def softmax_by_hand(logits):
    powers = (logits - logits.max(-1, keepdim=True).values).exp()
    return powers / powers.sum(-1, keepdim=True)


LOGITS = {
    "plain": _project,
    "cosine": _cosine,
    "noisy": _noisy,
    "cooled": lambda self, x_TD: _project(self, x_TD) / 0.7,
}
CASTS = {
    "fp32": lambda self, logits_TE: logits_TE.float(),
    "bf16": lambda self, logits_TE: logits_TE.bfloat16(),
    "rounded": lambda self, logits_TE: logits_TE.bfloat16().float(),
}
SCORES = {
    "logits": lambda self, logits_TE: logits_TE,
    "softmax": lambda self, logits_TE: logits_TE.softmax(dim=-1),
    "softmax by hand": lambda self, logits_TE: softmax_by_hand(logits_TE),
    "sigmoid": lambda self, logits_TE: logits_TE.sigmoid(),
    "sqrtsoftplus": lambda self, logits_TE: functional.softplus(logits_TE).sqrt(),
}


def _in_groups(scores_TE, closed):
    """Leave one group of two open, by the sum of its two best experts."""
    scores_TGE = scores_TE.unflatten(-1, (2, -1))
    best_T1 = scores_TGE.topk(2, dim=-1).values.sum(-1).topk(1, dim=-1).indices
    open_TG = torch.zeros_like(scores_TGE[..., 0]).scatter(1, best_T1, 1.0).bool()
    return scores_TGE.masked_fill(~open_TG.unsqueeze(-1), closed).flatten(-2)


MASKS = {
    "none": lambda self, scores_TE: scores_TE,
    "experts": lambda self, scores_TE: scores_TE.masked_fill(self.is_closed, float("-inf")),
    "groups by zero": lambda self, scores_TE: _in_groups(scores_TE, 0.0),
    "groups by infinity": lambda self, scores_TE: _in_groups(scores_TE, float("-inf")),
}
