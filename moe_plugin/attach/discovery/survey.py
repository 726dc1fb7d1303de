"""Find the routing sites of a model from its structure, not from a list of model names.

A router is the innermost module that selects experts for its tokens. A module that holds experts, or whose own code
uses a selecting call, is run once on tensors without data, and its rankings show how it routes. New models with an
ordinary router need no change here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.jit import ScriptModule
from torch.nn.parameter import is_lazy

from moe_plugin.attach.adapter import Adapter
from moe_plugin.attach.discovery.adapted import note_adapted
from moe_plugin.attach.discovery.code_names import uses
from moe_plugin.attach.discovery.expert_blocks import (
    experts_of,
    has_gate_for_a_stack,
    has_gate_for_a_weight,
    is_stack,
    may_route,
    without_router,
)
from moe_plugin.attach.discovery.findings import Findings
from moe_plugin.attach.discovery.module_names import aliases, holds, inner_first, inside
from moe_plugin.attach.discovery.probing.ranking_calls import NAMES
from moe_plugin.attach.discovery.routing_style import BiasPlace, FoundRouter, NoStyle, RoutingStyle
from moe_plugin.attach.discovery.surroundings import Surroundings
from moe_plugin.attach.discovery.understand import understand
from moe_plugin.errors import AttachError


def survey(model: nn.Module, adapters: Sequence[Adapter] = ()) -> Findings:
    """Find every router of the model, and every block of experts without one.

    Args:
        model: Any model.
        adapters: The user's, which come before our own.

    Raises:
        AttachError: If modules of the model have no parameters yet.
    """
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise AttachError(f"{lazy[0]!r} has no size yet. Run the model on one batch before it is balanced.")
    findings = Findings()
    doubts, unseen = [], []
    styles: dict[Any, RoutingStyle | NoStyle | None] = {}
    adapted = note_adapted(model, adapters, findings)
    names = aliases(model)
    for name, module in inner_first(model):
        taken = [alias for found in findings.names for alias in names[found]]
        if inside(name, adapted) or holds(name, (*taken, *adapted)):
            continue
        if isinstance(module, ScriptModule):
            if "aten::topk" in str(getattr(module, "inlined_graph", "")):
                findings.refused[name] = (
                    f"{module.original_name} calls topk in TorchScript, where no bias reaches it"
                )
        elif _may_select(module):
            around = Surroundings.of(model, name)
            key = _structure(around)
            if key not in styles:
                styles[key] = understand(around)
            _note(findings, name, around, styles[key])
            if styles[key] is None:
                (doubts if may_route(module) else unseen).append(name)
    _note_strangers(model, doubts, findings)
    _note_siblings(model, unseen, findings)
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    findings.routers = dict(sorted(findings.routers.items(), key=lambda item: order[item[0]]))
    return findings


def _may_select(module: nn.Module) -> bool:
    holds_experts = experts_of(module) or has_gate_for_a_stack(module) or has_gate_for_a_weight(module)
    return bool(holds_experts) or uses(type(module), NAMES)


def _note(findings: Findings, name: str, around: Surroundings, style: RoutingStyle | NoStyle | None) -> None:
    module = around.modules[0]
    if isinstance(style, NoStyle):
        where = findings.strangers if style.adaptable else findings.refused
        where[name] = f"{type(module).__name__} {style.reason}"
    elif style is not None:
        bias = None if style.bias is None else BiasPlace(*around.tensors()[style.bias])
        findings.routers[name] = FoundRouter(name, module, style, bias)


def _note_strangers(model: nn.Module, doubts: Sequence[str], findings: Findings) -> None:
    """Note blocks of experts without a router, and refuse modules that may be such blocks."""
    blocks = [name for name, module in model.named_modules() if experts_of(module)]
    holders = {
        *blocks,
        *doubts,
        *(name for name, found in findings.routers.items() if is_stack(found.module)),
    }
    for name in without_router(model, blocks, holders, findings.names):
        findings.strangers[name] = (
            f"{type(model.get_submodule(name)).__name__} holds experts, but no module near it was seen to select "
            "among them by topk, sort, argsort, argmax or max"
        )
    for name in without_router(model, doubts, holders, findings.names):
        findings.refused[name] = (
            f"{type(model.get_submodule(name)).__name__} looks like a block of experts, but was not seen to select "
            "any. If it does, write an Adapter for it and pass it in 'adapters'"
        )


def _note_siblings(model: nn.Module, unseen: Sequence[str], findings: Findings) -> None:
    """Refuse modules of a router's class that were not seen to select, such as gates inside gates."""
    kinds = {type(found.module): name for name, found in reversed(findings.routers.items())}
    for name in unseen:
        kind = type(model.get_submodule(name))
        if kind in kinds:
            findings.refused[name] = (
                f"{kind.__name__} is the class of router {kinds[kind]!r}, but was not seen to select one set of "
                "experts for each token here. If it does, write an Adapter for it and pass it in 'adapters'"
            )


def _structure(around: Surroundings) -> Any:
    """Return a key, equal for modules that are built and placed alike, such as the routers of a model's layers."""
    kinds = tuple(type(module) for module in around.modules)
    numbers = tuple(
        (name, value)
        for module in around.modules[:2]
        for name, value in vars(module).items()
        if isinstance(value, (int, float, str)) and "layer" not in name
    )
    shapes = tuple((key, getattr(*place).shape) for key, place in around.tensors().items())
    last = [name.rpartition(".")[2] for name, _ in around.path]
    # Layers are alike, a block's parts are not.
    places = tuple("" if part.isdigit() else part for part in last)
    return kinds, places, numbers, shapes, tuple(around.widths()), frozenset(around.expert_counts())
