"""The scores of routers in the last forward: models that a bias balances do not return them.

Shape legend: T tokens, K experts selected per token, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from torch import Tensor

from moe_plugin.attach.recording.watching import watching
from moe_plugin.attach.selection import Selection
from moe_plugin.attach.site import Site


class RouterScores(NamedTuple):
    """What a router decided in one forward, without gradients.

    Attributes:
        scores_TE: The scores that it ranked, without the bias; -inf for experts of closed groups.
        expert_ids_TK: The experts that it selected, by score plus bias.
        used_TK: bool, which of them the token uses, if tokens use different numbers of experts; None for all.
    """

    scores_TE: Tensor
    expert_ids_TK: Tensor
    used_TK: Tensor | None


@contextmanager
def router_scores(sites: Mapping[str, Site]) -> Iterator[dict[str, RouterScores]]:
    """Keep what each site decides in its last forward."""
    last: dict[str, RouterScores] = {}
    observers = {name: partial(_keep, last, name, site) for name, site in sites.items()}
    with watching(sites, observers):
        yield last


def _keep(
    last: dict[str, RouterScores], name: str, site: Site, selection: Selection, valid_T: Tensor | None
) -> None:
    # Copies: the model may change its tensors in place later.
    scores_TE, ids_TK = site.unbiased(selection.ranked_TE), selection.expert_ids_TK
    used_TK = None if selection.used_TK is None else _rows(selection.used_TK).clone()
    last[name] = RouterScores(_rows(scores_TE).clone(), _rows(ids_TK).clone(), used_TK)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
