"""What can be wrong with the load, in words, and what to do about it.

A check is a function of one site's history that returns what it found, or None. `CHECKS` lists them with what to do.

Shape legend: E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moe_plugin.metrics.history import SiteHistory, mean_violation

COLLAPSED_SHARE = 0.1
"""A site has collapsed if its effective number of experts is less than this share of the way from K up to E."""
SWINGING = -0.15
"""A bias overshoots if load errors correlate less than this from step to step, and steps are less even than windows."""
SWING_RATIO = 1.5
"""The least ratio of a step's MaxVio to its window's for that."""
SATURATED = 2.0
"""With a bias range of this many score ranges, the bias alone decides between the extremes."""
UNBALANCED = 0.5
"""Balance is bad if a step's MaxVio is above this, and above twice what sampling alone gives."""
IMPROVED = 0.9
"""MaxVio has fallen if its later half is below this share of its earlier half."""


@dataclass(frozen=True)
class Limits:
    """How long something must last before it is worth an alarm, in optimizer steps.

    Attributes:
        dead_steps: Steps without a token for an expert.
        trend_steps: Steps without an improvement, or with a growing bias.
    """

    dead_steps: int = 200
    trend_steps: int = 500


@dataclass(frozen=True)
class Alarm:
    """Something wrong with the load.

    Attributes:
        kind: The check, such as 'dead expert'.
        sites: The routers with the problem.
        step: The optimizer step at which it was found.
        finding: What was found, for the first of the sites.
        cure: What to do.
    """

    kind: str
    sites: tuple[str, ...]
    step: int
    finding: str
    cure: str

    def __str__(self) -> str:
        """Return all of it in one paragraph."""
        first, *rest = self.sites
        others = f" and {len(rest)} more router{'s' * (len(rest) > 1)}" if rest else ""
        return f"{self.kind} at step {self.step}: {first}{others}: {self.finding}. {self.cure}"


def _dead_expert(site: SiteHistory, limits: Limits) -> str | None:
    """Find experts without a token for `limits.dead_steps` steps."""
    dead = (site.idle_steps_E >= limits.dead_steps).nonzero().flatten().tolist()
    if not dead:
        return None
    names = ", ".join(map(str, dead[:8])) + (", ..." if len(dead) > 8 else "")
    return f"expert{'s' * (len(dead) > 1)} {names} got no token for {int(site.idle_steps_E.max())} steps"


def _collapse(site: SiteHistory, limits: Limits) -> str | None:
    """Find load on hardly more experts than one token takes."""
    load, least = site.last.load, site.top_k
    if site.num_experts <= least or not any(load.tokens_per_expert):
        return None
    effective = site.num_experts**load.entropy
    if effective > least + COLLAPSED_SHARE * (site.num_experts - least):
        return None
    return f"the load of {site.num_experts} experts is on {effective:.1f} of them, and a token takes {least}"


def _swinging_bias(site: SiteHistory, limits: Limits) -> str | None:
    """Find a bias that overshoots: an expert overloaded in one step is underloaded in the next."""
    load = site.last.load
    if load.steps < 8 or load.step_correlation > SWINGING or load.max_violation_batch <= _tolerated(site):
        return None
    if load.max_violation_batch < SWING_RATIO * load.max_violation_global:
        return None
    return (
        f"load errors swing from step to step (correlation {load.step_correlation:.2f}), "
        f"at MaxVio {load.max_violation_batch:.2f} in a step and {load.max_violation_global:.2f} over {load.steps}"
    )


def _saturated_bias(site: SiteHistory, limits: Limits) -> str | None:
    """Find a bias range beyond the range of the scores, for two windows."""
    windows = site.windows[-2:]
    if len(windows) < 2 or any(
        not window.score_range or window.bias_range < SATURATED * window.score_range for window in windows
    ):
        return None
    return (
        f"biases span {site.last.bias_range:.3g}, the scores of a token {site.last.score_range:.3g}: "
        "the bias alone decides between the experts at its ends"
    )


def _runaway_bias(site: SiteHistory, limits: Limits) -> str | None:
    """Find a bias that only grows, twofold over `limits.trend_steps`, while balance stays bad."""
    windows = site.since(limits.trend_steps)
    ranges = [window.bias_range for window in windows]
    grows = len(ranges) > 3 and ranges[-1] >= 2 * ranges[0] > 0 and ranges == sorted(ranges)
    if not grows or not _stays_unbalanced(site, limits):
        return None
    return f"the bias range grew from {ranges[0]:.3g} to {ranges[-1]:.3g} and MaxVio did not fall"


def _no_improvement(site: SiteHistory, limits: Limits) -> str | None:
    """Find a bias that moves for `limits.trend_steps` steps, while the load gets no better."""
    windows = site.since(limits.trend_steps)
    moves = len({window.bias_range for window in windows}) > 1
    if not moves or not _stays_unbalanced(site, limits) or _runaway_bias(site, limits):
        return None
    return f"MaxVio is {mean_violation(windows):.2f} and has not fallen for {limits.trend_steps} steps"


def _no_tokens(site: SiteHistory, limits: Limits) -> str | None:
    """Find a site without a token, while others counted some."""
    load = site.last.load
    if any(load.tokens_per_expert) or load.steps <= site.last.rejected_steps:
        return None
    return f"it saw no token in the last {load.steps} steps, while other routers did"


def _diverging_ranks(site: SiteHistory, limits: Limits) -> str | None:
    """Find ranks with different biases."""
    return None if site.last.ranks_agree else "its bias is not the same on every rank"


def _not_finite(site: SiteHistory, limits: Limits) -> str | None:
    """Find scores that are NaN."""
    if site.last.scores_are_finite:
        return None
    return f"its scores are NaN; {site.last.rejected_steps} of {site.last.load.steps} steps moved no bias"


def _rejected_steps(site: SiteHistory, limits: Limits) -> str | None:
    """Find steps that were thrown away although no NaN was seen in the scores."""
    rejected = site.last.rejected_steps
    if not rejected or not site.last.scores_are_finite:
        return None
    return (
        f"{rejected} of {site.last.load.steps} steps moved no bias: the loss or a score was NaN or infinite"
    )


def _stays_unbalanced(site: SiteHistory, limits: Limits) -> bool:
    windows = site.since(limits.trend_steps)
    if len(windows) < 4:
        return False
    middle = len(windows) // 2
    earlier, later = mean_violation(windows[:middle]), mean_violation(windows[middle:])
    return later > _tolerated(site) and later >= IMPROVED * earlier


def _tolerated(site: SiteHistory) -> float:
    """Return the MaxVio of a step above which balance is bad; see `UNBALANCED`."""
    load = site.last.load
    choices = sum(load.tokens_per_expert) / max(load.steps - load.empty_steps, 1)
    chance = math.sqrt(2 * math.log(max(site.num_experts, 2)) * site.num_experts / max(choices, 1))
    return max(UNBALANCED, 2 * chance)


Find = Callable[[SiteHistory, Limits], str | None]

CHECKS: Mapping[str, tuple[Find, str]] = {
    "dead expert": (
        _dead_expert,
        "Balance it (LossFreeBalancing), or with a higher 'rate'; warm_start() revives the experts of a pretrained "
        "model at once.",
    ),
    "collapse": (
        _collapse,
        "Balance it (LossFreeBalancing) from the first step; if it is balanced, raise 'rate', lower the learning "
        "rate, or use sigmoid scores.",
    ),
    "swinging bias": (
        _swinging_bias,
        "The rate is too high for this router, or the batch too small: lower 'rate', put more tokens in a step, or "
        "take Proportional() if the rule is Sign().",
    ),
    "saturated bias": (
        _saturated_bias,
        "Lower 'rate' or end with RateSchedule(freeze_after=...); look whether the router still learns (learning "
        "rate, weight decay).",
    ),
    "runaway bias": (
        _runaway_bias,
        "The bias does not reach the selection, or works against a router that runs ahead of it: look at the flip "
        "rate, lower the router's learning rate, or remove a second balancing (auxiliary loss).",
    ),
    "no improvement": (_no_improvement, "The rate is too low: raise 'rate', or take rate='auto'."),
    "no tokens": (_no_tokens, "Leave it out with 'sites', or look why its block is skipped."),
    "diverging ranks": (
        _diverging_ranks,
        "Its counts were not summed over all ranks, or something else writes the bias: check the process group, and "
        "that every rank loads the same checkpoint.",
    ),
    "NaN scores": (
        _not_finite,
        "Lower the learning rate, clip gradients, or compute the router in fp32.",
    ),
    "rejected steps": (
        _rejected_steps,
        "Lower the learning rate, clip gradients, and look for NaN in the data.",
    ),
}
"""By kind: the check, and what to do."""


class LoadAlarms:
    """All checks, run after each window; each kind is raised once for a site.

    Args:
        limits: How long is too long.
    """

    def __init__(self, limits: Limits) -> None:
        """Start without any alarm."""
        self.limits = limits
        self._raised: set[tuple[str, str]] = set()

    def new(self, sites: Mapping[str, SiteHistory]) -> list[Alarm]:
        """Return what is newly wrong, the sites of a kind together."""
        alarms = []
        for kind, (find, cure) in CHECKS.items():
            found = {
                name: finding
                for name, site in sites.items()
                if (kind, name) not in self._raised and (finding := find(site, self.limits))
            }
            if found:
                self._raised |= {(kind, name) for name in found}
                step = next(iter(sites.values())).last.step
                alarms.append(Alarm(kind, tuple(found), step, next(iter(found.values())), cure))
        return alarms
