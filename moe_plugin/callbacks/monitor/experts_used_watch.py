"""How many experts tokens use in a validation run, if their number varies: by layer, kind and loss, and in a text.

Shape legend: L sites, T tokens, S tokens of a sample, K experts selected per token, U numbers of experts used,
G kinds of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_plugin.attach.selection import Selection
from moe_plugin.attach.site import Site
from moe_plugin.callbacks.monitor.token_kinds import NOTHING, TokenBatch, TokenKinds, positions_of
from moe_plugin.metrics.experts_used import (
    ExpertsUsed,
    loss_correlation,
    loss_correlation_in_place,
    mean_used,
    used_by_loss,
)
from moe_plugin.plots import experts_per_token as pictures
from moe_plugin.plots.token_strip import TokenStrip, draw_strips

SAMPLES, SAMPLE_TOKENS = 4, 320
"""Sequences that are kept as text, of different domains if possible, and the tokens kept of each."""


class ExpertsUsedWatch:
    """A watch on the sites whose tokens use different numbers of experts, over the validation batches of this rank."""

    def __init__(self) -> None:
        """Start without tokens."""
        self.counts: ExpertsUsed | None = None
        self.strips: list[TokenStrip] = []
        self._seen: dict[str, Tensor] = {}
        self._batch = NOTHING

    def start_(self, sites: Mapping[str, Site], kinds: TokenKinds) -> None:
        """Begin a validation run.

        Args:
            sites: The routers.
            kinds: What is known of the tokens.
        """
        self._targets = {name: site.target_k for name, site in sites.items() if site.target_k is not None}
        self._kinds, self.strips, self.counts = kinds, [], None
        if self._targets:
            most = max(sites[name].top_k for name in self._targets)
            groups = {name: len(names) for name, names in kinds.names.items()}
            self.counts = ExpertsUsed(len(self._targets), most, groups)

    def batch_starts(self, batch: TokenBatch) -> None:
        """Expect these tokens in the next forward."""
        self._batch, self._seen = batch, {}

    def look(self, name: str, site: Site, selection: Selection, valid_T: Tensor | None) -> None:
        """Count what a site selected; see `Site.witnesses`."""
        if self.counts is None or name not in self._targets or selection.used_TK is None:
            return
        used_T = selection.used_TK.flatten(0, -2).sum(-1)
        # Padding becomes -1.
        self._seen[name] = used_T if valid_T is None else used_T.where(valid_T.reshape(-1).bool(), -1)

    def batch_ends(self, outputs: Any) -> None:
        """Take in a batch, with its `token_losses` if the validation step returned them."""
        if self.counts is None or list(self._seen) != list(self._targets):
            return
        used_LT = torch.stack(list(self._seen.values())).cpu()
        tokens_BS, losses_T, positions_T = self._batch.tokens_BS, None, None
        kinds = {name: kinds_T.cpu() for name, kinds_T in self._batch.kinds.items()}
        if tokens_BS is None or tokens_BS.numel() != used_LT.shape[1]:
            kinds, tokens_BS = {}, None
        elif isinstance(outputs, Mapping) and isinstance(outputs.get("token_losses"), Tensor):
            losses_T, positions_T = outputs["token_losses"].detach().flatten().cpu(), positions_of(tokens_BS)
        if tokens_BS is not None and not self.strips and self._kinds.token_bytes is not None:
            self.strips = list(self._samples(tokens_BS.cpu(), used_LT, losses_T))
        real_T = (used_LT >= 0).all(0)
        unknown_T = torch.full((int(real_T.sum()),), -1)
        self.counts.add_(
            used_LT[:, real_T],
            {name: kinds[name][real_T] if name in kinds else unknown_T for name in self.counts.by_kind},
            None if losses_T is None else losses_T[real_T],
            None if positions_T is None else positions_T[real_T],
        )

    def scalars(self) -> dict[str, float]:
        """Return the rank correlation of a token's experts with its loss: by layer, and the mean."""
        if self.counts is None or not self.counts.by_loss_LPUB.any():
            return {}
        scalars = {}
        for measure, values_L in _correlations(self.counts).items():
            scalars[f"val/loss_{measure}"] = values_L.nanmean().item()
            for name, value in zip(self._targets, values_L.tolist(), strict=True):
                scalars[f"val_layers/loss_{measure}/{name}"] = value
        return {name: value for name, value in scalars.items() if np.isfinite(value)}

    def images(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the tag and picture of all counts."""
        record = self.record()
        if record is None:
            return
        yield "experts_per_token/distribution", pictures.distribution(record["tokens"])
        for kind, table in record["by_kind"].items():
            yield (
                f"experts_per_token/by_{kind.replace(' ', '_')}",
                pictures.by_kind(table, record["means"], kind),
            )
        if record["by_loss"]:
            yield "experts_per_token/by_loss", pictures.by_loss(record["by_loss"], record["means"])
        if self.strips:
            yield "experts_per_token/text", draw_strips(self.strips)

    def record(self) -> dict[str, Any] | None:
        """Return all counts, ready for JSON; None if no number of experts varies or no token was seen."""
        if self.counts is None or not self.counts.tokens_LU.any():
            return None
        counts = self.counts
        return {
            "layers": list(self._targets),
            "target": list(self._targets.values()),
            "means": mean_used(counts.tokens_LU).tolist(),
            "tokens": counts.tokens_LU.tolist(),
            "by_kind": {
                kind: self._table(kind, table) for kind, table in counts.by_kind.items() if table.any()
            },
            "by_loss": _by_loss(counts) if counts.by_loss_LPUB.any() else None,
            "text": [strip.as_json() for strip in self.strips],
        }

    def _table(self, kind: str, table_LGU: Tensor) -> dict[str, Any]:
        """Return the kinds that occurred: their names, tokens and mean numbers of experts by layer."""
        tokens_G = table_LGU[0].sum(-1)
        seen_G = tokens_G > 0
        names = [name for name, seen in zip(self._kinds.names[kind], seen_G.tolist(), strict=True) if seen]
        means_LG = mean_used(table_LGU[:, seen_G])
        return {"names": names, "tokens": tokens_G[seen_G].tolist(), "means": means_LG.tolist()}

    def _samples(self, tokens_BS: Tensor, used_LT: Tensor, losses_T: Tensor | None) -> Iterator[TokenStrip]:
        used_LBS = used_LT.view(-1, *tokens_BS.shape)[..., :SAMPLE_TOKENS]
        domains = self._batch.kinds.get("domain")
        domain_B = (
            torch.arange(len(tokens_BS)) if domains is None else domains.cpu().view(tokens_BS.shape)[:, 0]
        )
        firsts = [int((domain_B == domain).nonzero()[0]) for domain in domain_B.unique()]
        names = self._kinds.names.get("domain")
        for row in firsts[:SAMPLES]:
            losses = [] if losses_T is None else losses_T.view(tokens_BS.shape)[row, :SAMPLE_TOKENS].tolist()
            yield TokenStrip(
                title="" if names is None or domains is None else names[int(domain_B[row])],
                pieces=self._kinds.text(tokens_BS[row, :SAMPLE_TOKENS]),
                used=used_LBS[:, row].clamp(min=0).tolist(),
                losses=[round(loss, 2) for loss in losses],
            )


def _by_loss(counts: ExpertsUsed) -> dict[str, Any]:
    losses_Q, means_LQ = used_by_loss(counts.by_loss_LPUB)
    finite = {
        measure: [value if np.isfinite(value) else None for value in values_L.tolist()]
        for measure, values_L in _correlations(counts).items()
    }
    return {"losses": losses_Q.tolist(), "means": means_LQ.tolist(), **finite}


def _correlations(counts: ExpertsUsed) -> dict[str, Tensor]:
    table = counts.by_loss_LPUB
    return {"correlation": loss_correlation(table), "correlation_in_place": loss_correlation_in_place(table)}
