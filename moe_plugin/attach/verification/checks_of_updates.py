"""Check that updates move the biases, in the direction that balances.

Shape legend: E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_plugin.attach.site import Site
from moe_plugin.attach.verification.observation import Seen, observing
from moe_plugin.attach.verification.result import require, skip_if
from moe_plugin.attach.verification.subject import Subject
from moe_plugin.metrics import max_violation

STEPS, LAST = 60, 10
ENOUGH_TOKENS = 8
"""How many of the smallest possible moves make an expert's load. With fewer, one move is more than an eighth of it."""
BALANCED = 0.3
"""MaxVio at which a load counts as balanced: with 8 tokens per expert, two tokens too many."""


def update_moves_bias(subject: Subject) -> str:
    """Check that one update lowers the bias of the most loaded expert against that of the least loaded."""
    model, sites = subject.balanced()
    movable = {name: site for name, site in sites.items() if site.top_k < site.num_experts}
    skip_if(not movable, "every token uses all experts")
    before = {name: site.bias.clone() for name, site in sites.items()}
    subject.train(model)
    record = sites.update()
    for name, site in movable.items():
        _moved(name, site, record.counts[name], site.bias - before[name])
    return ""


def _moved(name: str, site: Site, counts_E: Tensor, step_E: Tensor) -> None:
    skip_if(counts_E.min() == counts_E.max(), f"{name}: the load {counts_E.tolist()} is even")
    require(
        step_E.any(),
        f"{name}: the load is {counts_E.tolist()}, and an update by the default rule moved nothing",
    )
    if site.allocation is None:
        most, least = int(counts_E.argmax()), int(counts_E.argmin())
        steps = f"expert {most} by {step_E[most]:.2g}, expert {least} by {step_E[least]:.2g}"
        require(
            step_E[most] < step_E[least], f"{name}: the load is {counts_E.tolist()}, the update moved {steps}"
        )


def default_rule_balances(subject: Subject) -> str:
    """Check that some tens of updates by the default rule balance fixed inputs of a model that stands still."""
    model, sites = subject.balanced()
    model.train()
    with observing(sites) as seen:
        subject.forward(model)
    reasons = {name: _cannot_say(site, seen[name]) for name, site in sites.items()}
    judged = [name for name, reason in reasons.items() if not reason]
    skip_if(not judged, "; ".join(dict.fromkeys(f"{reason}" for reason in reasons.values())))
    violations = {name: [] for name in judged}
    for _ in range(STEPS):
        subject.forward(model)
        record = sites.update()
        for name in judged:
            violations[name].append(max_violation(record.counts[name]).item())
    shown = []
    for name, values in violations.items():
        first, last = values[0], sum(values[-LAST:]) / LAST
        shown.append(f"{first:.2f} to {last:.2f}")
        limit = max(first / 2, BALANCED)
        expected = f"expected at most {limit:.2f}"
        require(last <= limit, f"{name}: MaxVio {first:.2f} became {last:.2f} in {STEPS} updates, {expected}")
    return f"MaxVio {', '.join(shown[:4])}{' and so on' * (len(shown) > 4)}"


def _cannot_say(site: Site, seen: list[Seen]) -> str:
    """Return why the load of a site shows nothing about the rule; '' if it does."""
    if site.top_k == site.num_experts:
        return "every token uses all experts"
    scores = torch.cat([call.scores_TE for call in seen]) if seen else torch.empty(0, site.num_experts)
    if not (scores.isfinite().all() or site.host_owns_bias):
        return "closed groups of experts decide the load, and a bias does not open them"
    return _too_few(scores, site.top_k)


def _too_few(scores_TE: Tensor, top_k: int) -> str:
    """Return why there are too few tokens; tokens with equal scores always select alike, so they move together."""
    if not len(scores_TE):
        return "no token is seen"
    steps_TE = (scores_TE / scores_TE.std().clamp(min=1e-30) * 1e4).round()
    together = int(steps_TE.unique(dim=0, return_counts=True)[1].max())
    load = len(scores_TE) * top_k / scores_TE.shape[1]
    shown = f"{load:.1f} per expert, of which up to {together} always move together"
    needed = f"at least {ENOUGH_TOKENS} times as many are needed per expert"
    return "" if load >= ENOUGH_TOKENS * together else f"too few tokens to say: {shown}; {needed}"
