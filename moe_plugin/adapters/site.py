"""A routing site: one router of the host, its bias and its counters.

Shape legend: T tokens, K experts selected per token, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_plugin.adapters.token_mask import TokenMask
from moe_plugin.adapters.top_k import Selection
from moe_plugin.balancing.counts import EXTRA_SLOTS, count_, new_tally
from moe_plugin.errors import EffectError


class Site:
    """Where a model selects experts.

    Attributes:
        name: The router's module name in the model.
        num_experts: E.
        top_k: K.
        host_owns_bias: Whether the bias is the model's own tensor, saved in its checkpoints.
        zeros_masked: Whether the host marks experts outside the chosen groups by exact zeros.
        measures_spread: Whether the spread of the scores is measured, which ``rate: auto`` needs.
    """

    def __init__(
        self,
        name: str,
        router: nn.Module,
        *,
        num_experts: int,
        top_k: int,
        bias_owner: nn.Module,
        bias_name: str,
        host_owns_bias: bool,
        zeros_masked: bool,
        token_mask: TokenMask,
    ) -> None:
        """Describe a site; `attach_` makes the router report to it."""
        self.name = name
        self.router = router
        self.num_experts = num_experts
        self.top_k = top_k
        self.bias_owner = bias_owner
        self.bias_name = bias_name
        self.host_owns_bias = host_owns_bias
        self.zeros_masked = zeros_masked
        self.token_mask = token_mask
        self.measures_spread = False
        # Plain tensors, not buffers: DDP would overwrite every rank's counts by those of rank 0.
        self.tally = new_tally(num_experts)
        self.eval_tally = new_tally(num_experts)

    @property
    def bias(self) -> Tensor:
        """The live selection bias; fp32 (E,). Change it in place, with ``copy_()``."""
        return getattr(self.bias_owner, self.bias_name).detach()

    @property
    def counts(self) -> Tensor:
        """Tokens per expert in training forwards since the last update, on this rank; int64 (E,), live."""
        return self.tally[: self.num_experts]

    @property
    def eval_counts(self) -> Tensor:
        """Tokens per expert in evaluation forwards on this rank; int64 (E,), live: the reader zeroes it."""
        return self.eval_tally[: self.num_experts]

    def record_(self, seen: list[Selection], *, training: bool) -> None:
        """Count what the router's forward selected: the last selection seen.

        Raises:
            EffectError: If the forward made no recognisable selection.
        """
        if not seen:
            raise EffectError(
                f"Router {self.name!r} selected no experts by torch.topk over {self.num_experts} scores with "
                f"k={self.top_k}, so it cannot be balanced. Leave it out with 'sites'."
            )
        selection = seen[-1]
        self._to_device(selection.expert_ids_TK.device)
        count_(
            self.tally if training else self.eval_tally,
            selection.expert_ids_TK,
            selection.selected_TK,
            scores_TE=self._unbiased(selection.ranked_TE) if self.measures_spread and training else None,
            valid_T=self.token_mask.for_tokens(selection.expert_ids_TK[..., 0].numel(), self.name),
            training=training,
        )

    def take_tally(self) -> Tensor:
        """The tally of this rank since the last call, restarted from zero; int64 (E + EXTRA_SLOTS,)."""
        taken = self.tally.clone()
        self.tally.zero_()
        assert taken.numel() == self.num_experts + EXTRA_SLOTS
        return taken

    def _unbiased(self, ranked_TE: Tensor) -> Tensor:
        return ranked_TE - self.bias if self.host_owns_bias else ranked_TE

    def _to_device(self, device: torch.device) -> None:
        if self.tally.device != device:
            self.tally = self.tally.to(device)
            self.eval_tally = self.eval_tally.to(device)
