"""What experts do in a validation run: which domains and token classes they take, and which work together.

Shape legend: T tokens, K experts selected per token, E experts, G kinds of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_plugin.attach.selection import Selection
from moe_plugin.attach.site import Site
from moe_plugin.callbacks.monitor.expert_profiles import expert_profiles, profile_table
from moe_plugin.callbacks.monitor.load_over_time import LAYERS, spread
from moe_plugin.callbacks.monitor.token_kinds import NOTHING, TokenBatch, TokenKinds
from moe_plugin.callbacks.monitor.typical_tokens import TOKENS, TypicalTokens
from moe_plugin.metrics.router_names import short_names
from moe_plugin.plots.lift import coactivation_heatmap, lift_heatmap

KINDS = ("domain", "token class", "word")
"""The kinds of tokens that are counted by expert, where they are known."""
PAIRED_LAYERS = 3


class Specialisation:
    """Counts of the kinds of tokens that each expert takes, over the validation batches of this rank.

    If no kinds of tokens are known, pairs of experts and changes are still counted.

    Attributes:
        counts: By kind and router, how often tokens of each kind used each expert; int64 (G, E).
        pairs: By router, how often tokens used both of two experts; fp32 (E, E).
    """

    def __init__(self) -> None:
        """Start without counts."""
        self.counts: dict[str, dict[str, Tensor]] = {}
        self.pairs: dict[str, Tensor] = {}
        self._batch = NOTHING
        self._kinds = TokenKinds(None)
        self._typical: dict[str, TypicalTokens] = {}
        self._first: dict[str, Tensor] = {}
        self._last_first: dict[str, Tensor] = {}
        self._is_first_batch = True

    def start_(self, sites: Mapping[str, Site], kinds: TokenKinds) -> None:
        """Begin a validation run; see `ExpertsUsedWatch.start_`."""
        self._kinds, self.pairs = kinds, {}
        self.counts = {kind: {} for kind in KINDS if kind in kinds.names}
        self._last_first, self._first, self._is_first_batch = self._first, {}, True
        names, self._short = list(sites), short_names(sites)
        self._typical = {
            names[place]: TypicalTokens(sites[names[place]].num_routed)
            for place in spread(len(names), LAYERS)
        }

    def batch_starts(self, batch: TokenBatch) -> None:
        """Expect these tokens in the next forward."""
        self._batch = batch

    def batch_ends(self) -> None:
        """End a batch."""
        self._is_first_batch = False

    def look(self, name: str, site: Site, selection: Selection, valid_T: Tensor | None) -> None:
        """Count what a site selected; see `Site.witnesses`."""
        if name not in self._typical:
            return
        ids_TK = selection.expert_ids_TK.flatten(0, -2)
        used_TK = torch.ones_like(ids_TK, dtype=torch.bool)
        if selection.used_TK is not None:
            used_TK = selection.used_TK.flatten(0, -2)
        if valid_T is not None:
            used_TK = used_TK & valid_T.reshape(-1, 1).bool()
        self._count(name, site, ids_TK, used_TK)
        tokens_BS = self._batch.tokens_BS
        if tokens_BS is not None and self._kinds.token_bytes is not None and tokens_BS.numel() == len(ids_TK):
            scores_TK = selection.selected_TK.flatten(0, -2).float().masked_fill(~used_TK, -torch.inf)
            self._typical[name].add_(scores_TK, ids_TK, tokens_BS)
        chosen_TE = torch.zeros(
            min(TOKENS, len(ids_TK)), site.num_experts, dtype=torch.float32, device=ids_TK.device
        )
        chosen_TE = chosen_TE.scatter_(1, ids_TK[:TOKENS], used_TK[:TOKENS].float())[:, : site.num_routed]
        pairs_EE = chosen_TE.T @ chosen_TE
        self.pairs[name] = self.pairs[name] + pairs_EE if name in self.pairs else pairs_EE
        if self._is_first_batch:
            self._first[name] = ids_TK[:TOKENS].masked_fill(~used_TK[:TOKENS], -1)

    def scalars(self) -> dict[str, float]:
        """Return the share of the first batch's choices that equal the last run's, by layer and on average."""
        shares = {
            name: _kept(now_TK, self._last_first[name])
            for name, now_TK in self._first.items()
            if name in self._last_first and self._last_first[name].shape == now_TK.shape
        }
        if not shares:
            return {}
        kept = dict(zip(shares, torch.stack(list(shares.values())).tolist(), strict=True))
        mean = sum(kept.values()) / len(kept)
        return {"val/kept_choices": mean} | {
            f"val_layers/kept_choices/{name}": share for name, share in kept.items()
        }

    def images(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the tag and picture of all counts."""
        for kind, tables in self.counts.items():
            if tables:
                shown = {name: table.cpu().numpy() for name, table in tables.items()}
                yield (
                    f"experts_by_{kind.replace(' ', '_')}/lift",
                    lift_heatmap(shown, self._kinds.names[kind], "choices over chance"),
                )
        for place in spread(len(self.pairs), PAIRED_LAYERS):
            name, pairs_EE = list(self.pairs.items())[place]
            if len(pairs_EE) > 2:
                picture = coactivation_heatmap(pairs_EE.cpu().long().numpy(), "chosen together, over chance")
                yield f"coactivation/{self._short[name]}", picture

    def texts(self) -> Iterator[tuple[str, str]]:
        """Yield the tag and Markdown table of each layer's experts."""
        for layer in self.record():
            yield f"experts/{self._short[layer['layer']]}", profile_table(layer["experts"])

    def record(self) -> list[dict[str, Any]]:
        """Return what each expert of each layer takes, ready for JSON; empty if no kinds of tokens are known."""
        names = {kind: self._kinds.names[kind] for kind, tables in self.counts.items() if tables}
        if not names:
            return []
        return [
            {
                "layer": name,
                "experts": expert_profiles(
                    {kind: self.counts[kind][name].cpu().numpy() for kind in names},
                    names,
                    typical.snippets(self._kinds),
                ),
            }
            for name, typical in self._typical.items()
        ]

    def _count(self, name: str, site: Site, ids_TK: Tensor, used_TK: Tensor) -> None:
        for kind, tables in self.counts.items():
            kinds_T = self._batch.kinds.get(kind)
            if kinds_T is not None and len(kinds_T) == len(ids_TK):
                groups = len(self._kinds.names[kind])
                table = _count_kinds(kinds_T, ids_TK, groups, site.num_experts, used_TK)[:, : site.num_routed]
                tables[name] = tables[name] + table if name in tables else table


def _count_kinds(
    kinds_T: Tensor, expert_ids_TK: Tensor, groups: int, num_experts: int, used_TK: Tensor
) -> Tensor:
    """Return how often tokens of each kind used each expert; int64 (G, E)."""
    kinds_T = kinds_T.to(expert_ids_TK.device)
    known_T = (kinds_T >= 0) & (kinds_T < groups)
    cells = (kinds_T.unsqueeze(-1) * num_experts + expert_ids_TK)[known_T.unsqueeze(-1) & used_TK]
    return cells.bincount(minlength=groups * num_experts).view(groups, num_experts)


def _kept(now_TK: Tensor, before_TK: Tensor) -> Tensor:
    """Return the share of the experts used now that the same token used before; -1 stands for no expert."""
    same_TK = (now_TK.unsqueeze(-1) == before_TK.unsqueeze(-2)).any(-1)
    used_TK = now_TK >= 0
    return (same_TK & used_TK).sum() / used_TK.sum()
