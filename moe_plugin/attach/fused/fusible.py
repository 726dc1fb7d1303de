"""Decide, before a model is changed, whether the fused experts can replace its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from moe_plugin.attach.discovery.routing_style import FoundRouter
from moe_plugin.attach.fused.agreement import disagreement
from moe_plugin.attach.fused.projections import Projections, experts_of_routers, projections_of
from moe_plugin.errors import AttachError


def find_fusible(
    model: nn.Module, routers: Sequence[FoundRouter]
) -> dict[str, tuple[nn.Module, Projections]]:
    """Return the layers of experts of these routers by name, each proven to be computed by the fused experts.

    Args:
        model: The model.
        routers: Its routers.

    Raises:
        AttachError: If a router has no such layer.
    """
    layers, without = experts_of_routers(model, routers)
    verdicts = _verdicts(layers)
    reasons: dict[str, list[str]] = {}
    for name in without:
        reasons.setdefault("it has no 3-D parameters with one entry per expert near it", []).append(name)
    for name, verdict in verdicts.items():
        if isinstance(verdict, str):
            reasons.setdefault(verdict, []).append(name)
    if reasons:
        raise AttachError(
            "experts='fused' must be able to replace the experts of every router, and cannot here: "
            f"{_listed(reasons)}. Leave 'experts' out, or leave these routers out with 'sites'."
        )
    return {
        name: (layers[name], projections)
        for name, projections in verdicts.items()
        if isinstance(projections, Projections)
    }


def _verdicts(layers: Mapping[str, nn.Module]) -> dict[str, Projections | str]:
    verdicts: dict[str, Projections | str] = {}
    for name, layer in layers.items():
        like = next((other for other in verdicts if _is_alike(layer, layers[other])), None)
        verdicts[name] = _verdict(layer) if like is None else verdicts[like]
    return verdicts


def _verdict(experts: nn.Module) -> Projections | str:
    projections = projections_of(experts)
    return projections if isinstance(projections, str) else disagreement(experts, projections) or projections


def _listed(reasons: Mapping[str, Sequence[str]]) -> str:
    def some(names: Sequence[str]) -> str:
        return f"{names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")

    return "; ".join(f"{some(names)}: {reason}" for reason, names in reasons.items())


def _is_alike(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two modules differ only in the values of their parameters, so one proof holds for both."""
    if type(one) is not type(other) or _shapes(one) != _shapes(other):
        return False
    mine, theirs = _attributes(one), _attributes(other)
    parts, others = dict(one.named_children()), dict(other.named_children())
    return (
        mine.keys() == theirs.keys()
        and parts.keys() == others.keys()
        and all(_is_same(value, theirs[name]) for name, value in mine.items())
        and all(_is_alike(part, others[name]) for name, part in parts.items())
    )


def _shapes(module: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (parameter.shape, parameter.dtype) for name, parameter in module.named_parameters()}


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return what its forward may depend on: buffers, and attributes that not every module has."""
    return vars(module)["_buffers"] | {k: v for k, v in vars(module).items() if k not in _OF_EVERY_MODULE}


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, _PLAIN) and type(one) is type(other) and one == other)


_PLAIN = (bool, int, float, str)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
