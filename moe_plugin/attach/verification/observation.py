"""What the routers of a model select in a run, recorded instead of counted.

Shape legend: T tokens, K experts selected per token, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from moe_plugin.attach.selection import Selection
from moe_plugin.attach.site import Site


class Seen(NamedTuple):
    """What one call of a router selected.

    Attributes:
        scores_TE: Unbiased scores in fp32; -inf for experts of closed groups.
        ids_TK: The experts selected.
        counted_TK: bool, which selections count: not those of padding, nor those that a token does not use.
    """

    scores_TE: Tensor
    ids_TK: Tensor
    counted_TK: Tensor


@contextmanager
def observing(sites: Mapping[str, Site]) -> Iterator[dict[str, list[Seen]]]:
    """Record every call of the sites' routers; while the context is open nothing is counted."""
    seen: dict[str, list[Seen]] = {name: [] for name in sites}
    for name, site in sites.items():
        site.observer = _Recorder(site, seen[name])
    try:
        yield seen
    finally:
        for site in sites.values():
            site.observer = None


def same_selections(one: Mapping[str, list[Seen]], other: Mapping[str, list[Seen]]) -> bool:
    """Return whether two runs selected the same experts in the same order.

    Args:
        one: What was seen in a run.
        other: The same of another.
    """
    ids = [[[seen.ids_TK for seen in calls] for calls in run.values()] for run in (one, other)]
    return all(
        len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
        for ours, theirs in zip(*ids, strict=True)
    )


class _Recorder:
    def __init__(self, site: Site, seen: list[Seen]) -> None:
        self.site = site
        self.seen = seen

    def __call__(self, selection: Selection, valid_T: Tensor | None) -> None:
        self.seen.append(seen_in(self.site, selection, valid_T))


def seen_in(site: Site, selection: Selection, valid_T: Tensor | None) -> Seen:
    """Return a selection as tests need it.

    Args:
        site: The router's site.
        selection: What it selected.
        valid_T: bool, True for tokens that count; None when all do.
    """
    ids_TK = _rows(selection.expert_ids_TK)
    used_TK = selection.used_TK
    counted_TK = torch.ones_like(ids_TK, dtype=torch.bool) if used_TK is None else _rows(used_TK)
    if valid_T is not None:
        counted_TK = counted_TK & valid_T.reshape(-1, 1)
    scores_TE = _rows(site.unbiased(selection.ranked_TE).float())
    return Seen(scores_TE, ids_TK.clone(), counted_TK)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
