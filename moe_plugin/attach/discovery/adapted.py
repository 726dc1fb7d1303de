"""Blocks that an adapter describes: the user's, or one in `moe_plugin.attach.families`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from functools import cache

from torch import nn

from moe_plugin.attach import families
from moe_plugin.attach.adapter import Adapter
from moe_plugin.attach.discovery.findings import Findings
from moe_plugin.attach.discovery.module_names import inside
from moe_plugin.attach.discovery.routing_style import FoundRouter, RoutingStyle


def note_adapted(model: nn.Module, adapters: Sequence[Adapter], findings: Findings) -> list[str]:
    """Note the blocks that an adapter names.

    Args:
        model: Any model.
        adapters: The user's, which come before our own.
        findings: Receives the blocks.

    Returns:
        Their names.
    """
    names: list[str] = []
    for name, module in model.named_modules():
        adapter = _adapter_for(module, adapters)
        if adapter is None or inside(name, names):
            continue
        names.append(name)
        if adapter.refused:
            findings.refused[name] = f"{type(module).__name__} {adapter.refused}"
        elif not adapter.places(module):
            findings.strangers[name] = (
                f"something else is in the place of {type(module).__name__}.{adapter.method}, which its adapter "
                "replaces; balance before it is put there"
            )
        else:
            num_experts, top_k = adapter.number(module, "num_experts"), adapter.number(module, "top_k")
            style = RoutingStyle(num_experts, top_k, kind="adapter", proven=True, adapter=adapter)
            findings.routers[name] = FoundRouter(name, module, style)
    return names


@cache
def _own_adapters() -> tuple[Adapter, ...]:
    """Return the adapters of the files in ``moe_plugin.attach.families``, each as ``ADAPTER``."""
    names = sorted(module.name for module in pkgutil.iter_modules(families.__path__))
    return tuple(importlib.import_module(f"{families.__name__}.{name}").ADAPTER for name in names)


def _adapter_for(module: nn.Module, adapters: Sequence[Adapter]) -> Adapter | None:
    return next((adapter for adapter in (*adapters, *_own_adapters()) if adapter.fits(module)), None)
