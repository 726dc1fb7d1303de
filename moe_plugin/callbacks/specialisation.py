"""What experts are for, seen over a validation run: which domains and token classes they take, and with whom.

Shape legend: T tokens, K experts selected per token, E experts, G kinds of tokens, B sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_plugin.adapters.intercept import Selection
from moe_plugin.adapters.site import Site
from moe_plugin.callbacks.load_film import LAYERS, spread
from moe_plugin.plots.lift import coactivation_heatmap, lift_heatmap

TOKENS = 2048
"""At most so many tokens of a batch are looked at for pairs of experts and for changes since the last run."""
PAIRED_LAYERS = 3


class Specialisation:
    """Counts what kinds of tokens each expert takes, over the validation batches of this rank.

    Kinds of tokens are read where they are: `batch["domain"]` (int (B,)), and the trainer's data module for their
    names in `domains`, and for classes of tokens in `token_classes`: names, and a class for each token id (int (V,)).
    Without any of them experts' pairs and changes are still counted.
    """

    def __init__(self) -> None:
        """Nothing is counted yet."""
        self.counts: dict[str, dict[str, Tensor]] = {}
        self.pairs: dict[str, Tensor] = {}
        self._kinds_T: dict[str, Tensor] = {}
        self._names: dict[str, list[str]] = {}
        self._first: dict[str, Tensor] = {}
        self._last_first: dict[str, Tensor] = {}
        self._is_first_batch = True

    def start_(self, sites: Mapping[str, Site], names: Mapping[str, list[str]]) -> None:
        """Look at the forwards of a validation run.

        Args:
            sites: The routers.
            names: By kind ('domain', 'token class'), what its numbers mean.
        """
        self.counts, self.pairs, self._names = {kind: {} for kind in names}, {}, dict(names)
        self._last_first, self._first, self._is_first_batch = self._first, {}, True
        for name in [list(sites)[place] for place in spread(len(sites), LAYERS)]:
            sites[name].witness = partial(self._look, name, sites[name])

    def stop_(self, sites: Mapping[str, Site]) -> None:
        """Look no longer."""
        for site in sites.values():
            site.witness = None

    def batch_starts(self, kinds: Mapping[str, Tensor]) -> None:
        """The kinds of the tokens of the next forward: int64 (T,) for each."""
        self._kinds_T = dict(kinds)

    def batch_ends(self) -> None:
        """A batch is over."""
        self._is_first_batch = False

    def kept_choices(self) -> float | None:
        """Share of the choices in the first batch that are those of the run before; None if there was none."""
        shares = [
            _kept(now_TK, self._last_first[name])
            for name, now_TK in self._first.items()
            if name in self._last_first and self._last_first[name].shape == now_TK.shape
        ]
        return float(torch.stack(shares).mean()) if shares else None

    def images(self) -> Iterator[tuple[str, np.ndarray]]:
        """Tag and picture of everything that was counted."""
        for kind, tables in self.counts.items():
            if tables:
                shown = {str(place): table.cpu().numpy() for place, table in enumerate(tables.values())}
                title = f"how often an expert takes a {kind}, over chance"
                yield (
                    f"experts_by_{kind.replace(' ', '_')}/lift",
                    lift_heatmap(shown, self._names[kind], title),
                )
        for place in spread(len(self.pairs), PAIRED_LAYERS):
            name, pairs_EE = list(self.pairs.items())[place]
            if len(pairs_EE) > 2:
                title = f"experts chosen together, over chance, {name}"
                yield f"coactivation/{name}", coactivation_heatmap(pairs_EE.cpu().long().numpy(), title)

    def _look(self, name: str, site: Site, selection: Selection, valid_T: Tensor | None) -> None:
        ids_TK = selection.expert_ids_TK.flatten(0, -2)
        used_TK = torch.ones_like(ids_TK, dtype=torch.bool)
        if selection.used_TK is not None:
            used_TK = selection.used_TK.flatten(0, -2)
        for kind, kinds_T in self._kinds_T.items():
            if kind in self._names and len(kinds_T) == len(ids_TK):
                groups = len(self._names[kind])
                valid = None if valid_T is None else valid_T.reshape(-1)
                table = count_kinds(kinds_T, ids_TK, groups, site.num_experts, valid, used_TK)[
                    :, : site.num_routed
                ]
                tables = self.counts[kind]
                tables[name] = tables[name] + table if name in tables else table
        ids_TK = ids_TK[:TOKENS]
        chosen_TE = torch.zeros(len(ids_TK), site.num_experts, dtype=torch.float32, device=ids_TK.device)
        chosen_TE = chosen_TE.scatter_(1, ids_TK, used_TK[:TOKENS].float())[:, : site.num_routed]
        pairs_EE = chosen_TE.T @ chosen_TE
        self.pairs[name] = self.pairs[name] + pairs_EE if name in self.pairs else pairs_EE
        if self._is_first_batch:
            self._first[name] = ids_TK.sort(-1).values


def count_kinds(
    kinds_T: Tensor,
    expert_ids_TK: Tensor,
    groups: int,
    num_experts: int,
    valid_T: Tensor | None,
    used_TK: Tensor,
) -> Tensor:
    """How often tokens of each kind used each expert; int64 (G, E)."""
    kinds_T = kinds_T.to(expert_ids_TK.device)
    known_T = (kinds_T >= 0) & (kinds_T < groups)
    keep_T = known_T if valid_T is None else known_T & valid_T.bool()
    cells = (kinds_T.unsqueeze(-1) * num_experts + expert_ids_TK)[keep_T.unsqueeze(-1) & used_TK]
    return cells.bincount(minlength=groups * num_experts).view(groups, num_experts)


def kinds_of(batch: Any, token_classes: Tensor | None) -> dict[str, Tensor]:
    """The domain of each token, and its class, where the batch tells; int64 (T,) each."""
    if not isinstance(batch, Mapping):
        return {}
    tokens_BS = batch["tokens"][:, :-1] if "tokens" in batch else batch.get("input_ids")
    if not isinstance(tokens_BS, Tensor) or tokens_BS.dim() != 2:
        return {}
    kinds = {}
    if isinstance(batch.get("domain"), Tensor):
        kinds["domain"] = batch["domain"].repeat_interleave(tokens_BS.shape[1])
    if token_classes is not None:
        kinds["token class"] = token_classes.to(tokens_BS.device)[tokens_BS.flatten()]
    return kinds


def _kept(now_TK: Tensor, before_TK: Tensor) -> Tensor:
    same_TK = (now_TK.unsqueeze(-1) == before_TK.unsqueeze(-2)).any(-1)
    return same_TK.float().mean()
