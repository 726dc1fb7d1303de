"""A routing site: one router of the host, its bias and its counters.

Shape legend: T tokens, K experts selected per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_plugin.attach.discovery.ranking_calls import Use
from moe_plugin.attach.selection import as_one
from moe_plugin.attach.steering.intercept import Selection
from moe_plugin.attach.token_mask import TokenMask
from moe_plugin.balancing.budget import count_slack_, new_budget
from moe_plugin.balancing.counts import count_
from moe_plugin.balancing.gaps import count_gaps_, gaps_of, new_gaps
from moe_plugin.balancing.tally import Tally
from moe_plugin.errors import EffectError
from moe_plugin.routing import DynamicRouter, ZeroExpertRouter
from moe_plugin.types import Routing

_FIX = "Write an Adapter for it and pass it in 'adapters', or leave it out with 'sites'."
Observer = Callable[[Selection, Tensor | None], None]


class Site:
    """Where a model selects experts.

    Attributes:
        name: The router's module name in the model.
        num_experts: E.
        top_k: K, the most experts of a token where their number varies.
        num_routed: Experts that compute something: the first ones, all of them in most models.
        target_k: Experts that a token should use in the mean, where their number varies; None where it does not.
        shares_E: The share of all selections that each expert should get; float64 (E,), None for equal shares.
        dynamic: The router itself, if it lets tokens use different numbers of experts at a held mean.
        budget_1G: How far selected experts of a dynamic router were from being left out; int64.
        kind: The kind of call that selects, or 'adapter'.
        use: How the host uses what that call returns.
        host_owns_bias: Whether the bias is the model's own tensor, saved in its checkpoints.
        zeros_masked: Whether the host marks experts outside the chosen groups by exact zeros.
        proven: Whether it was seen that the host's own bias reaches its selection.
        measures_spread: Whether the spread of the scores is measured, which ``rate: auto`` needs.
        looks_closely: Whether this step measures the spread, and looks for what is not expected to change.
        gaps_EG: How far scores were from being selected since the last update; int64, None if not measured.
        observer: Takes each selection and its bool (T,) mask of real tokens, which then do not count; None lets them.
        is_interpreted: Whether a forward that counted ran outside of compiled code.
        witness: Is shown each selection that counts, unless the forward is compiled; None for nobody.
    """

    def __init__(
        self,
        name: str,
        router: nn.Module,
        *,
        num_experts: int,
        top_k: int,
        kind: str,
        use: Use,
        bias_owner: nn.Module,
        bias_name: str,
        host_owns_bias: bool,
        zeros_masked: bool,
        proven: bool,
        token_mask: TokenMask,
    ) -> None:
        """Describe a site; `attach_` makes the router report to it."""
        self.name = name
        self.router = router
        self.num_experts = num_experts
        self.top_k = top_k
        self.num_routed = router.num_routed if isinstance(router, ZeroExpertRouter) else num_experts
        self.target_k = router.target_k if isinstance(router, DynamicRouter | ZeroExpertRouter) else None
        self.shares_E: Tensor | None = None
        if isinstance(router, ZeroExpertRouter):
            self.shares_E = torch.tensor(router.load_shares_E, dtype=torch.float64)
        self.dynamic = router if isinstance(router, DynamicRouter) else None
        self.budget_1G = None if self.dynamic is None else new_budget()
        self.kind = kind
        self.use = use
        self.bias_owner = bias_owner
        self.bias_name = bias_name
        self.host_owns_bias = host_owns_bias
        self.zeros_masked = zeros_masked
        self.proven = proven
        self.token_mask = token_mask
        self.masked = token_mask.describes(name)
        self.measures_spread = False
        self.looks_closely = True
        self.gaps_EG: Tensor | None = None
        self.observer: Observer | None = None
        self.is_interpreted = False
        self.witness: Observer | None = None
        self.tally = Tally(num_experts)
        self.eval_tally = Tally(num_experts)

    @property
    def bias(self) -> Tensor:
        """The live selection bias; fp32 (E,). Change it in place, with ``copy_()``."""
        return self.bias_tensor.detach().view(-1)

    @property
    def bias_tensor(self) -> Tensor:
        """The module's own tensor behind `bias`, in the shape it has there."""
        buffer = self.bias_owner._buffers.get(self.bias_name)  # its __getattr__ takes longer
        return getattr(self.bias_owner, self.bias_name) if buffer is None else buffer

    @property
    def counts(self) -> Tensor:
        """Tokens per routed expert in training forwards since the last update, on this rank; int64 (E,)."""
        return self.tally.settled()[: self.num_routed]

    @property
    def eval_counts(self) -> Tensor:
        """Tokens per routed expert in evaluation forwards on this rank; int64 (E,), until `forget_eval_`."""
        return self.eval_tally.settled()[: self.num_routed]

    @property
    def eval_tokens(self) -> Tensor:
        """Tokens in evaluation forwards on this rank; int64 scalar."""
        return self.tokens_in(self.eval_tally.settled())

    def forget_eval_(self) -> None:
        """Count evaluation forwards anew."""
        self.eval_tally.reset_()

    def tokens_in(self, slots_S: Tensor) -> Tensor:
        """Return the tokens that slots of this site's tallies are of, int64 (..., S); int64 (...)."""
        if self.dynamic is not None:
            return slots_S[..., self.num_experts + 2]
        return slots_S[..., : self.num_experts].sum(-1) // self.top_k

    def record_(self, seen: list[Selection], output: Any, *, training: bool, compiling: bool) -> None:
        """Count what the router's forward selected.

        Args:
            seen: The selections.
            output: What the router returned.
            training: Whether it is in training mode.
            compiling: Whether it is being compiled.

        Raises:
            EffectError: If the forward made no recognisable selection.
        """
        if not seen:
            how = "its adapter's select" if self.kind == "adapter" else f"torch.{self.kind}"
            raise EffectError(
                f"Router {self.name!r} selected no experts by {how} over {self.num_experts} scores with "
                f"k={self.top_k}, so it cannot be balanced. {_FIX}"
            )
        selection = seen[0] if len(seen) == 1 else self._joined(seen)
        if isinstance(output, Routing) and output.used_TK is not None:
            selection = selection._replace(used_TK=output.used_TK)
        ids_TK = selection.expert_ids_TK
        valid_T = None
        if self.masked and self.token_mask.mask_BS is not None:
            valid_T = self.token_mask.for_tokens(ids_TK.numel() // ids_TK.shape[-1], self.name)
        if self.observer is not None:
            self.observer(selection.detached(), valid_T)
            return
        if not compiling:
            self.is_interpreted = True
            if self.witness is not None:
                self.witness(selection.detached(), valid_T)
        self._count_(selection, valid_T, training, compiling)
        if training and (self.gaps_EG is not None or self.budget_1G is not None):
            self._count_gaps_(selection, output, valid_T)

    def _count_(self, selection: Selection, valid_T: Tensor | None, training: bool, compiling: bool) -> None:
        ids_TK = selection.expert_ids_TK
        tally = self.tally if training else self.eval_tally
        if tally.slots_S.device != ids_TK.device:
            self._to_device(ids_TK.device)
        # A second graph for the steps between would be compiled, which costs more than measuring.
        measures = self.measures_spread and training and (compiling or self.looks_closely)
        used_TK = None if self.dynamic is None else selection.used_TK
        # A replay of a CUDA graph would leave Python's lists out.
        captured = ids_TK.is_cuda and torch.cuda.is_current_stream_capturing()
        if not (compiling or measures or captured) and valid_T is None and used_TK is None:
            tally.keep_(ids_TK, selection.selected_TK, training=training)
            return
        count_(
            tally.slots_S,
            ids_TK,
            selection.selected_TK.detach() if training else None,
            scores_TE=self.unbiased(selection.ranked_TE.detach()) if measures else None,
            valid_T=valid_T,
            used_TK=used_TK,
            training=training,
        )

    def _count_gaps_(self, selection: Selection, output: Any, valid_T: Tensor | None) -> None:
        if self.gaps_EG is not None and self.top_k < self.num_experts:
            biased_TE = self.unbiased(selection.ranked_TE.detach()) + self.bias
            count_gaps_(self.gaps_EG, gaps_of(biased_TE, self.top_k), valid_T)
        if self.budget_1G is not None and output.slack_TK is not None:
            count_slack_(self.budget_1G, output.slack_TK, valid_T)

    def measure_gaps_(self) -> None:
        """Count from now on how far scores are from being selected, which some rules need."""
        self.gaps_EG = new_gaps(self.num_experts).to(self.tally.slots_S.device)

    def discard_(self) -> None:
        """Forget what was counted since the last update."""
        self.tally.reset_()
        for counts in (self.gaps_EG, self.budget_1G):
            if counts is not None:
                counts.zero_()

    def unbiased(self, ranked_TE: Tensor) -> Tensor:
        """The scores behind what the host ranked: without its own bias, and -inf for experts of closed groups."""
        if self.zeros_masked:
            ranked_TE = ranked_TE.masked_fill(ranked_TE == 0, -torch.inf)
        return ranked_TE - self.bias if self.host_owns_bias else ranked_TE

    def _joined(self, seen: list[Selection]) -> Selection:
        return as_one(seen, self.use, rounds=len(seen) if self.kind == "adapter" else self.use.rounds)

    def _to_device(self, device: torch.device) -> None:
        self.tally.to_(device)
        self.eval_tally.to_(device)
        self.gaps_EG = None if self.gaps_EG is None else self.gaps_EG.to(device)
        self.budget_1G = None if self.budget_1G is None else self.budget_1G.to(device)
        self.shares_E = None if self.shares_E is None else self.shares_E.to(device)
