"""Run a router once more on its first real input, to learn what its rankings are for and to prove that steering works.

What was found on tensors without data may not hold: another mode, other arguments, a forward that broke off. A trial
leaves nothing behind: state, random numbers and inputs are restored.

Shape legend: T tokens, K experts selected per token, E experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from moe_plugin.attach.discovery.probing.decision import Decision, decide
from moe_plugin.attach.discovery.probing.ranking import Ranking
from moe_plugin.attach.discovery.probing.restored import Snapshot
from moe_plugin.attach.discovery.probing.trace import Trace, tensors_in
from moe_plugin.attach.discovery.routing_style import NoStyle, Plan
from moe_plugin.attach.site import FIX, Site
from moe_plugin.errors import EffectError

_FEW = 16
"""With fewer tokens two rankings may choose the same by chance."""


@dataclass(frozen=True)
class Trial:
    """A call of a router, to be made a few times more.

    Attributes:
        site: The router's site.
        forward: The host's forward.
        args: Its arguments.
        kwargs: Its named arguments.
    """

    site: Site
    forward: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]

    def run(self, mode: TorchFunctionMode) -> Any:
        """Run the forward under a mode, on copies of its inputs, which it may change, and leave nothing behind.

        Parts of it that are compiled run eagerly, and warnings are left to the real forward. Activation checkpointing
        does not see what autograd saves here: it would miss that when it recomputes.
        """
        eager, unseen = torch.compiler.set_stance("force_eager"), saved_tensors_hooks(_as_it_is, _as_it_is)
        host = self._host.restoring()
        with eager, unseen, host, warnings.catch_warnings(action="ignore"):
            args, kwargs = tree_map_only(Tensor, self._copy, (self.args, self.kwargs))
            with mode:
                return self.forward(*args, **kwargs)

    @property
    def num_tokens(self) -> int:
        """T, as the size of the first tensor says; 0 if it does not."""
        first = next((tensor.numel() for tensor in tensors_in((self.args, self.kwargs))), 0)
        return round(first * self.site.style.tokens_per_entry)

    @cached_property
    def _host(self) -> Snapshot:
        return Snapshot(self.site.router, *self.args, *self.kwargs.values())

    def _copy(self, tensor: Tensor) -> Tensor:
        return tensor if tensor is self.site.bias_place.tensor() else tensor.clone()


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def learn(trial: Trial) -> Plan | None:
    """Return what each ranking in a forward is for; None if it selects nothing.

    Args:
        trial: The forward.

    Raises:
        EffectError: If the router selects otherwise than it was found to, or its own bias does not reach the selection.
    """
    site = trial.site
    trace = Trace({"bias": site.bias_place.tensor()})
    trace.note_returned_(trial.run(trace))
    rankings, style = trace.rankings, site.style
    of_experts = [each for each in rankings if each.call.num_items == style.num_experts]
    decision = _decision(trial, rankings, of_experts)
    if decision is None and any(not each.hard and each.call.kind == style.kind for each in of_experts):
        raise EffectError(
            f"Router {site.name!r} ranks its experts, but was not seen to use what a ranking selects, so it cannot be "
            f"balanced. {FIX}"
        )
    if decision is None:
        return None
    if isinstance(decision, NoStyle):
        raise EffectError(f"Router {site.name!r} {decision.reason}, so it cannot be balanced. {FIX}")
    _check_as_found(site, decision)
    if site.host_owns_bias and not style.proven and not any("bias" in each.added for each in rankings):
        raise EffectError(
            f"Router {site.name!r} owns {site.bias_place.name!r}, but does not add it to the scores by which it "
            f"selects experts, so balancing would have no effect. {FIX}"
        )
    num_ranked = decision.ranking.call.scores.numel() // style.num_experts
    return decision.plan._replace(certain=not decision.plan.repeats or num_ranked >= _FEW)


def _check_as_found(site: Site, decision: Decision) -> None:
    """Check that a decision selects as many experts, from the same end of its ranking, as the router's style says."""
    style, use = site.style, decision.use
    # Some routers select fewer experts in evaluation, which only counts.
    top_k = decision.top_k if site.router.training else style.top_k
    if (top_k, use.rounds) != (style.top_k, style.use.rounds):
        raise EffectError(
            f"Router {site.name!r} must select {_described(style.top_k, style.use.rounds)}, as it was found to, but "
            f"its forward selects {_described(decision.top_k, use.rounds)}. {FIX}"
        )
    cuts_otherwise = decision.ranking.call.kind == "topk" and use.cut != style.use.cut
    if cuts_otherwise or use.from_end != style.use.from_end:
        raise EffectError(
            f"Router {site.name!r} must use the part of its ranking that it was found to use, but its forward uses "
            f"another. {FIX}"
        )


def _decision(
    trial: Trial, rankings: Sequence[Ranking], of_experts: Sequence[Ranking]
) -> Decision | NoStyle | None:
    """Decide how experts were selected, for the number of tokens that the input says, or the most that were ranked."""
    most = max((each.call.scores.numel() for each in of_experts), default=0) // trial.site.num_experts
    biases = ("bias",) if trial.site.host_owns_bias else ()
    decisions = (
        decide(rankings, of_experts, each, biases=biases)
        for each in (trial.num_tokens, most)
        if each or not most
    )
    return next((decision for decision in decisions if decision is not None), None)


def _described(top_k: int, rounds: int) -> str:
    return f"{top_k} experts" if rounds == 1 else f"{top_k} experts one after another"
