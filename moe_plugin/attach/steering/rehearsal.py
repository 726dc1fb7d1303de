"""Prove that routers can be balanced before they run, on random inputs; compiled code is not proven when it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.distributed.tensor import DTensor

from moe_plugin.attach.discovery.probing.probe import WRONG_CALL
from moe_plugin.attach.discovery.probing.restored import ChangedParameterError
from moe_plugin.attach.site import Site
from moe_plugin.attach.steering.proof import prove
from moe_plugin.attach.steering.router import host_forward
from moe_plugin.attach.steering.trial import Trial, learn


def rehearse_(sites: Sequence[Site]) -> None:
    """Note which routers pass the proof; of those that are built alike, the first one runs.

    A router that does not pass is not refused: random inputs may be none that it takes. It must run uncompiled first.

    Args:
        sites: Watched sites, of which those that are verified already are left out.

    Raises:
        EffectError: If a router changes a large parameter in its forward.
    """
    passed: dict[int, bool] = {}
    for site in sites:
        if site.is_verified or site.style.adapter is not None:
            continue
        if id(site.style) not in passed:
            passed[id(site.style)] = _passes(site)
        site.is_rehearsed = passed[id(site.style)]


def _passes(site: Site) -> bool:
    example, router, plan = site.style.example, site.router, site.style.plans[True]
    tensors = [*router.parameters(), *router.buffers()]
    if not plan.certain or example is None:
        return False
    if any(tensor.is_meta or isinstance(tensor, DTensor) for tensor in tensors):
        return False
    forward = host_forward(router)

    def in_training(*args: Any, **kwargs: Any) -> Any:
        for module in router.modules():  # the trial restores it
            module.training = True
        return forward(*args, **kwargs)

    try:
        trial = Trial(site, in_training, *example.filled())
        return learn(trial) == plan and prove(trial, plan) == ""
    except ChangedParameterError:
        raise
    except WRONG_CALL:
        return False
