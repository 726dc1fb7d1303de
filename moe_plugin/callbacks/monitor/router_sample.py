"""Samples of what routers decide in one micro-batch: counts alone do not show their scores.

Shape legend: T tokens, K experts selected per token, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moe_plugin.attach.selection import Selection
from moe_plugin.attach.site import Site
from moe_plugin.metrics.decisions import flip_rate, router_confidence, score_range

TOKENS = 4096
"""Tokens of a micro-batch that are looked at, at most."""


@dataclass(frozen=True)
class Decisions:
    """How a router decided, over the tokens that were looked at.

    Attributes:
        confidence: See `router_confidence`.
        flip_rate: See `flip_rate`.
        score_range: See `score_range`.
        are_finite: Whether no score is NaN.
    """

    confidence: float
    flip_rate: float
    score_range: float
    are_finite: bool


class RouterSample:
    """One training forward of each router between two `take`s, on this rank, seen without waiting for the device.

    Compiled routers are not seen.
    """

    def __init__(self) -> None:
        """Start without a sample."""
        self._seen: dict[str, Tensor] = {}

    def start_(self, sites: Mapping[str, Site]) -> None:
        """Look at the next forward of each router that was not seen yet."""
        for name, site in sites.items():
            site.witnesses[self] = partial(self._look, name, site)

    def stop_(self, sites: Mapping[str, Site]) -> None:
        """Stop looking."""
        for site in sites.values():
            site.witnesses.pop(self, None)

    def take(self) -> dict[str, Decisions]:
        """Return what was seen since the last call, by router."""
        seen, self._seen = self._seen, {}
        if not seen:
            return {}
        rows = torch.stack(list(seen.values())).tolist()
        return {
            name: Decisions(confidence, flips, width, bool(finite))
            for name, (confidence, flips, width, finite) in zip(seen, rows, strict=True)
        }

    def _look(self, name: str, site: Site, selection: Selection, valid_T: Tensor | None) -> None:
        if name in self._seen:
            return
        num_experts, top_k = selection.ranked_TE.shape[-1], selection.expert_ids_TK.shape[-1]
        scores_TE = site.unbiased(selection.ranked_TE.reshape(-1, num_experts)[:TOKENS])
        ids_TK = selection.expert_ids_TK.reshape(-1, top_k)[:TOKENS]
        used_TK = torch.ones_like(ids_TK, dtype=torch.bool)
        # Experts that cost nothing are chosen like others; a dynamic router leaves some of its choices out.
        if selection.used_TK is not None and site.level is not None:
            used_TK = selection.used_TK.reshape(-1, top_k)[:TOKENS]
        if valid_T is not None:
            keep_T = valid_T.reshape(-1)[:TOKENS].bool()
            scores_TE, ids_TK, used_TK = scores_TE[keep_T], ids_TK[keep_T], used_TK[keep_T]
        measures = (
            router_confidence(scores_TE, ids_TK, used_TK),
            flip_rate(scores_TE, ids_TK, used_TK),
            score_range(scores_TE),
            (~scores_TE.isnan().any()).float(),
        )
        self._seen[name] = torch.stack(measures)
