"""A routing site: one router of the host, where its bias is, and what it has selected.

Shape legend: T tokens, K experts selected per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_plugin.attach.discovery.routing_style import BiasPlace, FoundRouter, Plan
from moe_plugin.attach.selection import Selection, as_one
from moe_plugin.attach.site_counters import SiteCounters
from moe_plugin.attach.token_mask import TokenMask
from moe_plugin.balancing.budget import count_slack_
from moe_plugin.balancing.gaps import count_gaps_, gaps_of
from moe_plugin.errors import EffectError
from moe_plugin.types import AllocatesExperts, Allocation, Routing

FIX = "Write an Adapter for it and pass it in 'adapters', or leave it out with 'sites'."
Observer = Callable[[Selection, Tensor | None], None]
"""Takes a selection and its bool (T,) mask of real tokens."""


class Site:
    """Where a model selects experts.

    Attributes:
        found: The router as it was found; `name`, `router` and `style` are its parts.
        bias_place: Where the selection bias is.
        token_mask: Which tokens count.
        counters: What was counted since the last update.
        num_routed: Experts that compute something: the first ones, all of them in most models.
        target_k: Experts that a token should use on average, if their number varies.
        plans: What the router's rankings are for, once a real forward has shown it; by whether it is in training mode
            and whether gradients are recorded.
        is_verified: Whether it was proven that a bias moves the selection and nothing else, or that is not wanted.
        is_rehearsed: Whether a router of its kind was proven so on random inputs.
        is_interpreted: Whether a forward that counted ran outside of compiled code.
        observer: Receives each selection instead of counting it; None counts as usual.
        witnesses: Also receive each counted selection, unless the forward is compiled; by who asked for it.
    """

    def __init__(self, found: FoundRouter, bias_place: BiasPlace, token_mask: TokenMask) -> None:
        """Describe a site; `attach_` makes the router report to it.

        Args:
            found: The router.
            bias_place: Where its bias is: the host's or our own.
            token_mask: The mask of the model's forward.
        """
        self.found = found
        self.name, self.router, self.style = found.name, found.module, found.style
        self.bias_place = bias_place
        self.token_mask = token_mask
        self.plans: dict[tuple[bool, bool], Plan] = {}
        self.is_verified = False
        self.is_rehearsed = False
        self.is_interpreted = False
        self.observer: Observer | None = None
        self.witnesses: dict[object, Observer] = {}
        self._is_masked = token_mask.describes(found.name)
        self._allocates = isinstance(self.router, AllocatesExperts)  # to ask once: it takes microseconds
        given = self.allocation
        self.num_routed = self.num_experts if given is None else given.num_routed
        self.target_k = None if given is None else given.target_k
        self.counters = SiteCounters(self.num_experts, self.top_k, given)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.style.num_experts

    @property
    def top_k(self) -> int:
        """K, the most experts of a token if their number varies."""
        return self.style.top_k

    @property
    def allocation(self) -> Allocation | None:
        """How experts are allocated now, if tokens use different numbers of them."""
        return self.router.allocation() if self._allocates else None  # pyright: ignore[reportCallIssue]

    @property
    def level(self) -> Tensor | None:
        """The live scalar that moves the number of experts of all tokens, if the router has one."""
        return None if self.allocation is None else self.allocation.level

    @property
    def host_owns_bias(self) -> bool:
        """Whether the bias is the model's own tensor, saved in its checkpoints."""
        return self.found.bias is not None

    @property
    def bias(self) -> Tensor:
        """The live selection bias; fp32 (E,). Change it in place, with ``copy_()``."""
        return self.bias_place.tensor().detach().view(-1)

    @property
    def counts(self) -> Tensor:
        """Tokens per routed expert in training forwards since the last update, on this rank; int64 (E,)."""
        return self.counters.training.settled()[: self.num_routed]

    @property
    def eval_counts(self) -> Tensor:
        """Tokens per routed expert in evaluation forwards on this rank; int64 (E,), until `forget_eval_`."""
        return self.counters.evaluation.settled()[: self.num_routed]

    @property
    def eval_tokens(self) -> Tensor:
        """Tokens in evaluation forwards on this rank; int64 scalar."""
        return self.counters.tokens_in(self.counters.evaluation.settled())

    def forget_eval_(self) -> None:
        """Forget the counts of evaluation forwards."""
        self.counters.evaluation.reset_()

    def unbiased(self, ranked_TE: Tensor) -> Tensor:
        """Return the host's scores without its own bias, and -inf for experts of closed groups."""
        if self.style.zeros_masked:
            ranked_TE = ranked_TE.masked_fill(ranked_TE == 0, -torch.inf)
        return ranked_TE - self.bias if self.host_owns_bias else ranked_TE

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
            self._refuse_unseen()
        selection = seen[0] if len(seen) == 1 else as_one(seen, self.style)
        if isinstance(output, Routing) and output.used_TK is not None:
            selection = selection._replace(used_TK=output.used_TK)
        ids_TK, valid_T = selection.expert_ids_TK, None
        if self._is_masked and self.token_mask.mask_BS is not None:
            valid_T = self.token_mask.for_tokens(ids_TK.numel() // ids_TK.shape[-1], self.name)
        if self.observer is not None:
            self.observer(selection.detached(), valid_T)
            return
        if not compiling:
            self.is_interpreted = True
            for witness in self.witnesses.values():
                witness(selection.detached(), valid_T)
        counters, scores_TE = self.counters, None
        # Compiled code measures in every step: a second graph for the steps between would cost more.
        if counters.measures_spread and training and (compiling or counters.looks_closely):
            scores_TE = self.unbiased(selection.ranked_TE.detach())
        counters.count_(selection, scores_TE, valid_T, training=training, compiling=compiling)
        if training and (counters.gaps_EG is not None or counters.budget_1G is not None):
            self._count_distances_(selection, output, valid_T)

    def _count_distances_(self, selection: Selection, output: Any, valid_T: Tensor | None) -> None:
        counters = self.counters
        if counters.gaps_EG is not None and self.top_k < self.num_experts:
            biased_TE = self.unbiased(selection.ranked_TE.detach()) + self.bias
            count_gaps_(counters.gaps_EG, gaps_of(biased_TE, self.top_k), valid_T)
        if counters.budget_1G is not None and output.slack_TK is not None:
            count_slack_(counters.budget_1G, output.slack_TK, valid_T)

    def _refuse_unseen(self) -> None:
        how = "its adapter's select" if self.style.adapter is not None else f"torch.{self.style.kind}"
        raise EffectError(
            f"Router {self.name!r} selected no experts by {how} over {self.num_experts} scores with k={self.top_k}, so "
            f"it cannot be balanced. {FIX}"
        )
