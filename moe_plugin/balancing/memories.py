"""A rule's memories of several sites, as one memory and back.

Shape legend: L sites.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_plugin.balancing.rules.rule import Memory


def stacked(memories: Sequence[Memory]) -> Memory:
    """Return one memory with a leading dimension (L, ...); what a site lacks is zero."""
    found = {key: value for memory in memories for key, value in memory.items()}
    return {
        key: torch.stack(
            [memory[key] if key in memory else torch.zeros_like(found[key]) for memory in memories]
        )
        for key in found
    }


def remember_(memories: Sequence[Memory], before: Memory, after: Memory, moved_L: Tensor) -> None:
    """Give each site its part of what a rule has changed; a site without tokens keeps its memory.

    Args:
        memories: One for each site; changed in place.
        before: Of `stacked`.
        after: The same after the rule's step.
        moved_L: bool, whether the site had tokens.
    """
    for key, value in after.items():
        if value is before.get(key):
            continue
        moved = moved_L.view(-1, *[1] * (value.dim() - 1))
        kept = value.where(moved, before[key] if key in before else torch.zeros_like(value))
        for memory, part in zip(memories, kept.unbind(), strict=True):
            memory[key] = part
