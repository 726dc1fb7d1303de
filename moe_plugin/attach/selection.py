"""Several selections of one forward as one.

Shape legend: T tokens, K experts selected per token, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_plugin.attach.discovery.ranking_calls import Use
from moe_plugin.attach.steering.intercept import Selection


def as_one(seen: Sequence[Selection], use: Use, rounds: int) -> Selection:
    """Join rounds side by side, and one below the other what was selected for different tokens.

    Where the host was seen to rank its experts more than once (``use.k`` is set), the last is the selection: group
    limits rank groups before they rank experts.
    """
    if rounds > 1:
        seen = [_side_by_side(seen[first : first + rounds]) for first in range(0, len(seen), rounds)]
    elif use.k is not None:
        return seen[-1]
    return seen[0] if len(seen) == 1 else _below(seen)


def _side_by_side(picks: Sequence[Selection]) -> Selection:
    selected_TK = torch.cat([pick.selected_TK for pick in picks], dim=-1)
    return Selection(
        picks[0].ranked_TE, selected_TK, torch.cat([pick.expert_ids_TK for pick in picks], dim=-1)
    )


def _below(parts: Sequence[Selection]) -> Selection:
    rows = [[tensor.reshape(-1, tensor.shape[-1]) for tensor in part[:3]] for part in parts]
    return Selection(*(torch.cat(column) for column in zip(*rows, strict=True)))
