"""Check that every selection of a real token counts once.

Shape legend: T tokens, K experts selected per token, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_plugin.attach.balanced_model import BalancedModel
from moe_plugin.attach.discovery.probing.trace import tensors_in
from moe_plugin.attach.site import Site
from moe_plugin.attach.verification.observation import Seen, observing
from moe_plugin.attach.verification.result import require
from moe_plugin.attach.verification.subject import Balanced, Subject


def counts(subject: Subject) -> str:
    """Check the counts of training and evaluation against a second count, with and without a measured spread."""
    balanced = subject.balanced()
    total = count_again(subject, balanced)
    require(total, "no router has selected an expert")
    _evaluation_is_apart(subject, balanced)
    if all(site.counts.any() for site in balanced.sites.values()):
        balanced.sites.update()  # the first step of 16 counts in another way than the others
        count_again(subject, balanced)
    return f"{len(balanced.sites)} router{'s' * (len(balanced.sites) > 1)}, {total} selections"


def count_again(subject: Subject, balanced: Balanced) -> int:
    """Compare the counts of a training step with those made from a recorded one; return the number of selections.

    Args:
        subject: The model under test.
        balanced: The copy that counts.
    """
    model, sites = balanced
    with observing(sites) as seen, _tokens_at(sites) as tokens:
        subject.train(model)
    sites.discard_counts_()
    subject.train(model)
    for name, site in sites.items():
        _tokens_agree(name, tokens[name], seen[name])
        _counts_agree(name, site, seen[name], site.counts)
    return sum(int(site.counts.sum()) for site in sites.values())


def _evaluation_is_apart(subject: Subject, balanced: Balanced) -> None:
    """Check that passes without training leave the training counts alone, and that evaluation is counted."""
    model, sites = balanced
    before = {name: site.counts.clone() for name, site in sites.items()}
    with observing(sites) as seen:
        subject.evaluate(model)
    subject.evaluate(model)
    for name, site in sites.items():
        _counts_agree(name, site, seen[name], site.eval_counts)
        site.forget_eval_()
    with torch.no_grad():
        subject.forward(model.train())
    for name, site in sites.items():
        changed = not torch.equal(site.counts, before[name])
        require(not changed, f"{name}: evaluation or no_grad changed the training counts")


def _counts_agree(name: str, site: Site, seen: list[Seen], counts_E: Tensor) -> None:
    expected_E = torch.zeros(site.num_experts, dtype=torch.int64, device=counts_E.device)
    for call in seen:
        require(
            call.ids_TK.shape[1] == site.top_k,
            f"{name}: {call.ids_TK.shape[1]} experts per token, not {site.top_k}",
        )
        expected_E += torch.bincount(call.ids_TK[call.counted_TK], minlength=site.num_experts)
    expected_E = expected_E[: site.num_routed]
    shown = f"counted {counts_E.tolist()}, expected {expected_E.tolist()}"
    require(torch.equal(counts_E, expected_E), f"{name}: {shown}")
    if site.allocation is None:
        tokens = sum(int(call.counted_TK.any(1).sum()) for call in seen)
        total = int(counts_E.sum())
        require(
            total == tokens * site.top_k, f"{name}: counted {total}, expected {tokens} tokens x {site.top_k}"
        )


def _tokens_agree(name: str, tokens: list[set[int]], seen: list[Seen]) -> None:
    """Compare with the tokens that hooks saw; a router that is not called as a module has no hooks."""
    if tokens:
        require(len(tokens) == len(seen), f"{name}: called {len(tokens)} times, selected {len(seen)} times")
        for possible, call in zip(tokens, seen, strict=True):
            seen_T = len(call.ids_TK)
            require(
                seen_T in possible,
                f"{name}: selected for {seen_T} tokens, its tensors have {sorted(possible)}",
            )


@contextmanager
def _tokens_at(sites: BalancedModel) -> Iterator[dict[str, list[set[int]]]]:
    """Note for each call of a router how many tokens it may have: rows of its input, or of what it returns."""
    tokens: dict[str, list[set[int]]] = {name: [] for name in sites}

    def hook(site: Site) -> Any:
        def note(_module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            first = next(tensors_in((args, list(kwargs.values()))), None)
            widths = (site.num_experts, site.top_k)
            rows = {t.numel() // t.shape[-1] for t in tensors_in(output) if t.dim() and t.shape[-1] in widths}
            if first is not None and first.dim():
                rows.add(first.numel() // first.shape[-1])
            tokens[site.name].append(rows)

        return note

    handles = [site.router.register_forward_hook(hook(site), with_kwargs=True) for site in sites.values()]
    try:
        yield tokens
    finally:
        for handle in handles:
            handle.remove()
