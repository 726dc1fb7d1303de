"""What a router selected in one forward.

Shape legend: T tokens, K experts selected per token, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_plugin.attach.discovery.routing_style import RoutingStyle


class Selection(NamedTuple):
    """One expert selection as the host made it: the scores it ranked, and what it chose.

    Attributes:
        ranked_TE: Scores that were ranked.
        selected_TK: Scores of the selected experts.
        expert_ids_TK: The selected experts.
        used_TK: Which of them the token uses; None for all.
    """

    ranked_TE: Tensor
    selected_TK: Tensor
    expert_ids_TK: Tensor
    used_TK: Tensor | None = None

    def detached(self) -> Selection:
        """Return the same without gradients."""
        return self._replace(ranked_TE=self.ranked_TE.detach(), selected_TK=self.selected_TK.detach())


def as_one(seen: Sequence[Selection], style: RoutingStyle) -> Selection:
    """Join rounds along K, and selections for different tokens along T.

    If the host ranks its experts more than once (``use.k`` is set), the last ranking is the selection: group limits
    rank groups first.

    Args:
        seen: The selections of a forward, at least one.
        style: How the router selects.
    """
    rounds = len(seen) if style.kind == "adapter" else style.use.rounds
    if rounds > 1:
        seen = [_side_by_side(seen[first : first + rounds]) for first in range(0, len(seen), rounds)]
    elif style.use.k is not None:
        return seen[-1]
    return seen[0] if len(seen) == 1 else _below(seen)


def _side_by_side(picks: Sequence[Selection]) -> Selection:
    selected_TK = torch.cat([pick.selected_TK for pick in picks], dim=-1)
    ids_TK = torch.cat([pick.expert_ids_TK for pick in picks], dim=-1)
    return Selection(picks[0].ranked_TE, selected_TK, ids_TK)


def _below(parts: Sequence[Selection]) -> Selection:
    rows = [[tensor.reshape(-1, tensor.shape[-1]) for tensor in part[:3]] for part in parts]
    return Selection(*(torch.cat(column) for column in zip(*rows, strict=True)))
