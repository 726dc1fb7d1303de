"""Check that the bias decides which experts are selected, exactly as it should.

Shape legend: T tokens, K experts selected per token, E experts.
"""

from __future__ import annotations

import torch

from moe_plugin.attach.site import Site
from moe_plugin.attach.verification.observation import Seen, observing
from moe_plugin.attach.verification.result import require
from moe_plugin.attach.verification.subject import Subject

LARGE = 100.0
"""A large bias, in spreads of the scores."""


def large_bias(subject: Subject) -> str:
    """Check that every token selects an expert with a large bias, unless its group is closed."""
    model, sites = subject.balanced()
    with observing(sites) as seen:
        subject.evaluate(model)
    drawing = {name: _least_selected(site, seen[name]) for name, site in sites.items()}
    for name, site in sites.items():
        site.bias[drawing[name]] += LARGE * subject.spreads[name]
    for run in (subject.evaluate, subject.train):
        with observing(sites) as seen:
            run(model)
        for name, site in sites.items():
            for call in seen[name]:
                _all_select(name, site, drawing[name], call)
    return ""


def random_bias(subject: Subject) -> str:
    """Check that the experts with the largest sums of score and bias are selected."""
    model, sites = subject.biased()
    with observing(sites) as seen:
        subject.evaluate(model)
    for name, site in sites.items():
        for call in seen[name]:
            _are_best(name, site, call)
    subject.train(model)
    for name, site in sites.items():
        gradient = site.bias_place.tensor().grad
        require(gradient is None or not gradient.any(), f"{name}: a gradient reaches the bias")
    return ""


def _least_selected(site: Site, seen: list[Seen]) -> int:
    ids = torch.cat([torch.empty(0, dtype=torch.int64), *(call.ids_TK.flatten().cpu() for call in seen)])
    return int(torch.bincount(ids, minlength=site.num_experts)[: site.num_routed].argmin())


def _all_select(name: str, site: Site, expert: int, call: Seen) -> None:
    selects_T = (call.ids_TK == expert).any(1)
    # A bias that the model owns also opens groups; ours is added after they were chosen.
    closed_T = ~call.scores_TE[:, expert].isfinite()
    can_T = torch.ones_like(selects_T) if site.host_owns_bias else ~closed_T
    drawn, expected = int((selects_T & can_T).sum()), int(can_T.sum())
    require(drawn == expected, f"{name}: a large bias on expert {expert} drew {drawn} of {expected} tokens")


def _are_best(name: str, site: Site, call: Seen) -> None:
    """Compare each token's experts with a search that sorts nothing: k times the largest sum that is left."""
    # The later choices of an adapter may rank other scores than its first.
    k = 1 if site.style.kind == "adapter" else site.top_k
    sums_TE = call.scores_TE.double() + site.bias.double()
    rounding = 1e-5 * sums_TE[sums_TE.isfinite()].abs().max().item()
    for token, (sums, ids) in enumerate(zip(sums_TE.tolist(), call.ids_TK.tolist(), strict=True)):
        require(len(set(ids)) == len(ids), f"{name}: token {token} selects an expert twice: {ids}")
        left = list(sums)
        for _ in range(k - 1):
            left.remove(max(left))
        worst = min(sums[expert] for expert in ids[:k])
        wanted = sorted(range(len(sums)), key=lambda expert: -sums[expert])[:k]
        shown = f"{sorted(ids[:k])}, expected {sorted(wanted)}, which have the largest sums of score and bias"
        require(worst >= max(left) - rounding, f"{name}: token {token} selects {shown}")
