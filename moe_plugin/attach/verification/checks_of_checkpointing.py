"""Check balancing under activation checkpointing, which runs a forward twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_plugin.attach.verification.comparison import close, require_alike, require_same_counts
from moe_plugin.attach.verification.result import CheckSkipped, skip_if
from moe_plugin.attach.verification.subject import Outcome, Subject


def checkpointing(subject: Subject) -> str:
    """Check that recomputation selects the same experts and does not count, in both kinds of checkpointing."""
    reasons = [_recomputes(subject, use_reentrant) for use_reentrant in (False, True)]
    skip_if(all(reasons), "; ".join(reasons))
    return "".join(reasons)


def _recomputes(subject: Subject, use_reentrant: bool) -> str:
    """Check one kind; return why the model without balancing cannot be trained with it, '' if it can."""
    kind = f"{'reentrant' if use_reentrant else 'non-reentrant'} checkpointing"

    routers = list(subject.balanced().sites)

    def train(model: nn.Module) -> Outcome:
        _checkpoint_(model, routers, use_reentrant)
        return subject.train(model)

    try:
        subject.skip_unless_plain(train, what=f"trained with {kind}")
    except CheckSkipped as reason:
        return str(reason)
    for looks_closely in (True, False):  # the first step of 16 counts in another way than the others
        usual, other = subject.biased(), subject.biased()
        for site in (*usual.sites.values(), *other.sites.values()):
            site.counters.looks_closely = looks_closely
        expected, seen = subject.train(usual.model), train(other.model)
        require_same_counts(usual.sites, other.sites, f"with {kind}")
        require_alike(expected, seen, close, f"with {kind}")
    return ""


def _checkpoint_(model: nn.Module, routers: Sequence[str], use_reentrant: bool) -> None:
    """Checkpoint the module around each router, or the router if there is none with a forward."""
    for name in dict.fromkeys(_around(model, router) for router in routers):
        module = model.get_submodule(name)
        module.__dict__["forward"] = _checkpointed(module.forward, use_reentrant)


def _around(model: nn.Module, router: str) -> str:
    parent = router.rpartition(".")[0]
    is_called = not isinstance(model.get_submodule(parent), (nn.ModuleList, nn.ModuleDict))
    return parent if is_called else router


def _checkpointed(forward: Callable[..., Any], use_reentrant: bool) -> Callable[..., Any]:
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        # The reentrant kind has no backward unless an input needs a gradient.
        needs_gradient = torch.zeros((), requires_grad=torch.is_grad_enabled())

        def run(_: Tensor, *args: Any) -> Any:
            return forward(*args, **kwargs)

        return checkpoint(run, needs_gradient, *args, use_reentrant=use_reentrant)

    return checkpointed
