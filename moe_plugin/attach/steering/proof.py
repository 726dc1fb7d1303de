"""Prove in a router's first training forward that a bias would do what it must, and nothing else.

Balancing starts with a bias of zero, which shows nothing, so the router also runs with a random one: every token must
select by score plus bias, and the output must be what the host gives for those experts without a bias.

Shape legend: T tokens, K experts selected per token, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_plugin.attach.discovery.probing.trace import tensors_in
from moe_plugin.attach.discovery.routing_style import Plan
from moe_plugin.attach.selection import Selection, as_one
from moe_plugin.attach.site import FIX, Site
from moe_plugin.attach.steering.intercept import Intercept
from moe_plugin.attach.steering.trial import Trial
from moe_plugin.attach.verification.forced_selection import ForcedSelection
from moe_plugin.attach.verification.observation import Seen, seen_in
from moe_plugin.errors import EffectError


def prove(trial: Trial, plan: Plan) -> str:
    """Prove that a router can be balanced; return why its gate weights could not be compared, "" if they agree.

    Args:
        trial: Its forward.
        plan: What its rankings are for.

    Raises:
        EffectError: If the selection or the gate weights are not those that they must be.
    """
    site, own_E = trial.site, trial.site.bias.clone()
    plain, _ = _watched_run(trial, plan, own_E if site.host_owns_bias else torch.zeros_like(own_E))
    if site.top_k == site.num_experts or not len(plain.ids_TK):
        return ""
    bias_E = _random_bias(plain.scores_TE)
    biased, output = _watched_run(trial, plan, bias_E)
    _check_selection(site, biased, bias_E)
    # Other uses of such rankings are not known; a router that shares experts out may do so by the bias.
    if site.style.use.rounds > 1 or site.style.use.cut or site.allocation is not None:
        return ""
    expected = _forced_run(trial, plain, biased)
    if expected is None:
        return "was not seen to choose its experts again"
    if _alike(expected, output):
        return ""
    again = _forced_run(trial, plain, biased)
    if again is None or not _alike(expected, again):
        return "is random in a way that cannot be repeated"
    raise EffectError(
        f"The output of router {site.name!r} depends on the bias beyond which experts are selected: with a random bias "
        f"it is not what the model gives for the same experts without one. {FIX}"
    )


def _watched_run(trial: Trial, plan: Plan, bias_E: Tensor) -> tuple[Seen, Any]:
    """Return what the router selects with a bias, and its output."""
    site, seen = trial.site, list[Selection]()
    place = site.bias_place.tensor()
    before = place.detach().clone()
    try:
        if site.host_owns_bias:
            place.data.copy_(bias_E.view_as(place))
        output = trial.run(Intercept(site.style, plan, None if site.host_owns_bias else bias_E, seen, []))
        if site.host_owns_bias:
            place.data.copy_(bias_E.view_as(place))  # the trial has restored it
        return seen_in(site, as_one(seen, site.style).detached(), None), output
    finally:
        place.data.copy_(before)


def _forced_run(trial: Trial, plain: Seen, chosen: Seen) -> Any:
    """Return what the host gives for chosen experts without our bias; None if it was not seen to choose."""
    mode = ForcedSelection(trial.site, plain, chosen.ids_TK)
    output = trial.run(mode)
    return output if mode.has_forced else None


def _random_bias(scores_TE: Tensor) -> Tensor:
    """Return a bias (E,) of the size of the spread of the scores, the same whenever it is asked for."""
    finite = scores_TE[scores_TE.isfinite()]
    size = finite.std().item() if finite.numel() > 1 else 0.0
    random_E = torch.randn(scores_TE.shape[-1], generator=torch.Generator().manual_seed(0))
    return (random_E * (size or 1.0)).to(scores_TE.device)


def _check_selection(site: Site, seen: Seen, bias_E: Tensor) -> None:
    """Check that no expert that is left out has a larger sum of score and bias than one that is selected."""
    sums_TE = seen.scores_TE + bias_E
    if site.style.use.rounds > 1 or sums_TE.isnan().any():  # later rounds may rank other scores
        return
    worst_T = sums_TE.gather(-1, seen.ids_TK).amin(-1)
    best_T = sums_TE.scatter(-1, seen.ids_TK, -torch.inf).amax(-1)
    rounding = 1e-5 * sums_TE[sums_TE.isfinite()].abs().amax()
    wrong = int((worst_T < best_T - rounding).sum())
    if wrong:
        raise EffectError(
            f"Router {site.name!r} must select the experts with the largest sums of score and bias, but with a random "
            f"bias {wrong} of {len(worst_T)} tokens select others. {FIX}"
        )


def _alike(one: Any, other: Any) -> bool:
    """Return whether all numbers in two outputs agree, up to rounding."""
    pairs = zip(tensors_in(one), tensors_in(other), strict=True)
    return all(_close(a.detach(), b.detach()) for a, b in pairs)


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    finite = one[one.isfinite()].float().abs()
    size = finite.amax().item() if finite.numel() else 0.0
    tolerance = torch.finfo(one.dtype).eps ** 0.5
    return torch.allclose(one.float(), other.float(), rtol=tolerance, atol=tolerance * size, equal_nan=True)
