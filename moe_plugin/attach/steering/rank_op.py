"""The ranking of experts as an operator of our own, which compiled code calls.

After a graph break compiled code runs while the interception is active: a ``topk`` in it would be intercepted once more
and get the bias twice, on any backend. No mode sees inside of this operator, and no backend replaces it.

Shape legend: T tokens, N ranked items returned, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("moe_plugin", "FRAGMENT")
_LIBRARY.define("rank(Tensor scores, str kind, int k, int dim, bool largest) -> Tensor")


def _rank(scores: Tensor, kind: str, k: int, dim: int, largest: bool) -> Tensor:
    with torch._C.DisableTorchFunction():
        if kind == "topk":
            return torch.topk(scores, k, dim, largest).indices
        if kind in ("sort", "argsort"):
            return torch.sort(scores, dim=dim, descending=largest, stable=True).indices
        return (torch.argmax if largest else torch.argmin)(scores, dim, keepdim=True)


def _shape_of_rank(scores: Tensor, kind: str, k: int, dim: int, largest: bool) -> Tensor:
    shape = list(scores.shape)
    shape[dim] = k or shape[dim]
    return scores.new_empty(shape, dtype=torch.int64)


_LIBRARY.impl("rank", _rank, "CompositeExplicitAutograd")
torch.library.register_fake("moe_plugin::rank", _shape_of_rank, lib=_LIBRARY)
rank = torch.ops.moe_plugin.rank.default
"""``rank(scores, kind, k, dim, largest)``: what such a `Call` selects, int64 ids with ``dim`` kept."""
