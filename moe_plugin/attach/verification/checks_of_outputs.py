"""Check that the bias reaches a model's output through the selection only.

Shape legend: E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe_plugin.attach.discovery.probing.trace import tensors_in
from moe_plugin.attach.verification.comparison import close, identical, require_alike
from moe_plugin.attach.verification.forced_selection import force_
from moe_plugin.attach.verification.observation import observing, same_selections
from moe_plugin.attach.verification.result import CheckFailed, require, skip_if
from moe_plugin.attach.verification.subject import Outcome, Subject

SIZES = (1e-3, 1e-4, 1e-5, 1e-6)
"""Sizes of a small bias, in spreads of the scores."""


def zero_bias(subject: Subject) -> str:
    """Check that outputs and gradients are bit-identical before the first update."""
    plain, (balanced, _) = subject.plain(), subject.balanced()
    for run, when in ((subject.train, "in training"), (subject.evaluate, "in evaluation")):
        require_alike(run(plain), run(balanced), identical, f"at zero bias {when}")
    return ""


def small_bias(subject: Subject) -> str:
    """Check that a bias too small to change a selection changes no bit of the output."""
    model, sites = subject.balanced()
    before = {name: site.bias.clone() for name, site in sites.items()}
    plain = subject.evaluate(model)
    with observing(sites) as selected:
        subject.evaluate(model)
    generator = torch.Generator().manual_seed(2)
    for size in SIZES:
        for name, site in sites.items():
            noise_E = torch.randn(site.num_experts, generator=generator).to(site.bias)
            site.bias.copy_(before[name] + size * subject.spreads[name] * noise_E)
        with observing(sites) as now:
            biased = subject.evaluate(model)
        if same_selections(selected, now):
            require_alike(plain, biased, identical, f"with a bias of {size:g} spreads, which moves no token,")
            return f"a bias of {size:g} spreads of the scores"
    skip_if(True, f"even a bias of {SIZES[-1]:g} spreads of the scores changes a selection")
    return ""


def unbiased_gates(subject: Subject) -> str:
    """Check that a model without balancing, made to select the same experts, gives the same outputs and gradients."""
    _as_forced(subject, subject.evaluate, "in evaluation")
    if any(site.style.kind == "adapter" for site in subject.balanced().sites.values()):
        return "in evaluation only: a router with an adapter may draw its experts in training"
    _as_forced(subject, subject.train, "in training")
    return ""


def _as_forced(subject: Subject, run: Callable[[nn.Module], Outcome], when: str) -> None:
    balanced, sites = subject.biased()
    with observing(sites) as chosen:
        run(balanced)
    seen = _router_outputs(balanced, list(sites))
    biased = run(balanced)
    plain, reference = subject.plain(), subject.balanced()
    reference.model.train(balanced.training)
    unforced = force_(plain, reference.sites, chosen)
    expected_seen = _router_outputs(plain, list(sites))
    forced = run(plain)
    adapted = [name for name in unforced if sites[name].style.kind == "adapter"]
    skip_if(adapted, f"the routing of {adapted[:1]} differs too much from its adapter's to be forced")
    require(not unforced, f"{unforced[:1]}: no call in its forward chooses what it was seen to select")
    try:
        require_alike(
            forced, biased, close, f"{when}, compared with the same experts selected without a bias,"
        )
    except CheckFailed as failure:
        raise CheckFailed(f"{_first_wrong(expected_seen, seen)}{failure}") from failure


def _router_outputs(model: nn.Module, names: list[str]) -> list[tuple[str, list[Tensor]]]:
    """Return a list that receives the name and the output of each router that is called."""
    outputs: list[tuple[str, list[Tensor]]] = []
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, name=name: outputs.append(
                (name, [t.detach() for t in tensors_in(output)])
            )
        )
    return outputs


def _first_wrong(expected: list[tuple[str, list[Tensor]]], seen: list[tuple[str, list[Tensor]]]) -> str:
    """Return the first router whose output differs, as the start of a sentence."""
    for (name, ours), (_, theirs) in zip(seen, expected, strict=False):
        if not all(map(close, theirs, ours)):
            return f"{name}: its output depends on the bias beyond the selection; "
    return ""
