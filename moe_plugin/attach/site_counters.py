"""What one router has selected since the last update, on this rank.

Shape legend: T tokens, K experts selected per token, E experts, G bins of a histogram, S slots of a tally.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_plugin.attach.selection import Selection
from moe_plugin.balancing.budget import new_budget
from moe_plugin.balancing.counts import count_, expert_counts, num_tokens
from moe_plugin.balancing.gaps import new_gaps
from moe_plugin.balancing.tally import Tally
from moe_plugin.types import Allocation


class SiteCounters:
    """Counts the selections of one router.

    Plain tensors, moved to the device of the ids: DDP would overwrite the buffers of all ranks with those of rank 0.

    Attributes:
        training: Tokens per expert in training forwards.
        evaluation: The same in evaluation forwards, until it is reset.
        gaps_EG: How far scores were from being selected, which some rules need; int64, None if not measured.
        budget_1G: How far selected experts were from being left out, if a level moves their number; int64.
        shares_E: The share of all selections that each expert should get; float64, None for equal shares.
        measures_spread: Whether the spread of the scores is measured, which ``rate: auto`` needs.
        looks_closely: Whether this step measures the spread, and checks again that the router is as it was attached.
    """

    def __init__(self, num_experts: int, top_k: int, allocation: Allocation | None) -> None:
        """Start at zero.

        Args:
            num_experts: E.
            top_k: K, the most experts of a token if their number varies.
            allocation: How experts are allocated, if tokens use different numbers of them.
        """
        self._num_experts, self._top_k = num_experts, top_k
        self.training = Tally(num_experts)
        self.evaluation = Tally(num_experts)
        self.gaps_EG: Tensor | None = None
        self.budget_1G = None if allocation is None or allocation.level is None else new_budget()
        shares = None if allocation is None else allocation.load_shares_E
        self.shares_E = None if shares is None else torch.tensor(shares, dtype=torch.float64)
        self.measures_spread = False
        self.looks_closely = True

    @property
    def device(self) -> torch.device:
        """The device that counts."""
        return self.training.slots_S.device

    def measure_gaps_(self) -> None:
        """Count from now on how far scores are from being selected."""
        self.gaps_EG = new_gaps(self._num_experts).to(self.device)

    def tokens_in(self, slots_S: Tensor) -> Tensor:
        """Return the number of tokens in tallies (..., S); int64 (...)."""
        if self.budget_1G is not None:
            return num_tokens(slots_S)
        return expert_counts(slots_S).sum(-1) // self._top_k

    def count_(
        self,
        selection: Selection,
        scores_TE: Tensor | None,
        valid_T: Tensor | None,
        *,
        training: bool,
        compiling: bool,
    ) -> None:
        """Count what a forward selected.

        Args:
            selection: What it selected.
            scores_TE: Unbiased scores of all experts, to measure their spread; None to leave it out.
            valid_T: bool, True for tokens that count; None when all do.
            training: Whether the router is in training mode.
            compiling: Whether it is being compiled.
        """
        ids_TK = selection.expert_ids_TK
        tally = self.training if training else self.evaluation
        if tally.slots_S.device != ids_TK.device:
            self._to_device_(ids_TK.device)
        used_TK = None if self.budget_1G is None else selection.used_TK
        # A replayed CUDA graph does not run the Python code that keeps selections.
        captured = ids_TK.is_cuda and torch.cuda.is_current_stream_capturing()
        if not (compiling or captured) and scores_TE is None and valid_T is None and used_TK is None:
            tally.keep_(ids_TK, selection.selected_TK, training=training)
            return
        selected_TK = selection.selected_TK.detach() if training else None
        what = {"scores_TE": scores_TE, "valid_T": valid_T, "used_TK": used_TK}
        count_(tally.slots_S, ids_TK, selected_TK, **what, training=training)

    def discard_(self) -> None:
        """Forget what training forwards have counted since the last update."""
        self.training.reset_()
        for counts in (self.gaps_EG, self.budget_1G):
            if counts is not None:
                counts.zero_()

    def _to_device_(self, device: torch.device) -> None:
        self.training.to_(device)
        self.evaluation.to_(device)
        self.gaps_EG = None if self.gaps_EG is None else self.gaps_EG.to(device)
        self.budget_1G = None if self.budget_1G is None else self.budget_1G.to(device)
        self.shares_E = None if self.shares_E is None else self.shares_E.to(device)
