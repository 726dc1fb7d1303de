"""What a site has counted, and selections that it keeps to count them together.

Shape legend: T tokens, K experts selected per token, N selections, L sites, S slots of a tally.

A small operation costs more to call than to run. So the selections of small calls are only copied, and the next update
counts those of all sites at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_plugin.balancing.counts import finite_ids, new_tally
from moe_plugin.balancing.recompute import is_training_forward

MOST_CALLS, MOST_SELECTIONS = 64, 2**16
"""A site that keeps more counts it: this bounds its memory to half a MiB plus the last call's selections."""


class Tally:
    """The tally of one site in one mode, training or evaluation.

    Attributes:
        slots_S: See `moe_plugin.balancing.counts`; int64. Without kept selections: see `settled`.
        num_kept: Selections kept.
    """

    def __init__(self, num_experts: int) -> None:
        """Start at zero, on the CPU."""
        # A plain tensor, not a buffer: DDP would overwrite the counts of all ranks with those of rank 0.
        self.slots_S = new_tally(num_experts)
        self._ids: list[Tensor] = []
        self._selected: list[tuple[Tensor, int]] = []
        self.num_kept = 0

    def keep_(self, expert_ids_TK: Tensor, selected_TK: Tensor, *, training: bool) -> None:
        """Count these selections later; arguments as `count_` has them."""
        if training and not is_training_forward(torch.is_grad_enabled()):
            return
        # A copy, since hosts may write into their ids. Copying scores would cost as much as checking them.
        self._ids.append(expert_ids_TK.int())
        if training:
            if selected_TK.requires_grad:
                selected_TK = selected_TK.detach()
            self._selected.append((selected_TK, selected_TK._version))
        self.num_kept += expert_ids_TK.numel()
        if self.num_kept > MOST_SELECTIONS or len(self._ids) >= MOST_CALLS:
            settle_([self])

    def settled(self) -> Tensor:
        """Return all slots, with kept selections counted; int64 (S,), live until the next call."""
        settle_([self])
        return self.slots_S

    def reset_(self) -> None:
        """Set all counts to zero."""
        self.slots_S.zero_()
        self._forget_kept_()

    def _forget_kept_(self) -> None:
        self._ids, self._selected, self.num_kept = [], [], 0

    def to_(self, device: torch.device) -> None:
        """Continue counting on this device."""
        self.slots_S = self.settled().to(device)

    def kept_ids(self) -> list[Tensor]:
        """Return the kept ids of each call; int32 (N,)."""
        return [ids_TK.reshape(-1) for ids_TK in self._ids]

    def kept_selected(self) -> list[Tensor]:
        """Return the kept scores of each call, floating (N,); zeros if the host has changed them since."""
        return [
            (selected_TK if selected_TK._version == version else torch.zeros_like(selected_TK)).reshape(-1)
            for selected_TK, version in self._selected
        ]


def settle_(tallies: Sequence[Tally]) -> None:
    """Count what tallies keep; those that keep equally much share operations.

    Args:
        tallies: With equally many slots, on one device.
    """
    by_size: dict[int, list[Tally]] = {}
    for tally in tallies:
        by_size.setdefault(tally.num_kept, []).append(tally)
    by_size.pop(0, None)
    for alike in by_size.values():
        counts_LS = _kept_counts(alike)
        slots = [tally.slots_S for tally in alike]
        torch._foreach_add_(slots, list(counts_LS.unbind()))  # pyright: ignore[reportPrivateImportUsage]
        for tally in alike:
            tally._forget_kept_()


def _kept_counts(tallies: Sequence[Tally]) -> Tensor:
    """Return the kept selections as slots; int64 (L, S). All tallies keep equally many."""
    num_slots = len(tallies[0].slots_S)
    ids_LN = _rows(tallies, [ids for tally in tallies for ids in tally.kept_ids()]).long()
    selected = [selected for tally in tallies for selected in tally.kept_selected()]
    if selected:
        ids_LN = finite_ids(ids_LN, _rows(tallies, selected), num_slots)
    return ids_LN.new_zeros(len(tallies), num_slots).scatter_add_(1, ids_LN, torch.ones_like(ids_LN))


def _rows(tallies: Sequence[Tally], parts: list[Tensor]) -> Tensor:
    return torch.cat(parts).view(len(tallies), -1)
