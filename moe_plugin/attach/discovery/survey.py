"""Find the routing sites of a model from its structure, not from a list of model names.

A router is the innermost module that selects experts for its tokens. Where a module's own code uses a selecting
call, or experts hang on it, it is run once on tensors without data, and what it ranked tells the rest. A model that
appears tomorrow with an ordinary router is found without an edit here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.jit import ScriptModule
from torch.nn.parameter import is_lazy

from moe_plugin.attach.adapter import Adapter, adapter_for
from moe_plugin.attach.discovery.code_names import uses
from moe_plugin.attach.discovery.expert_blocks import (
    experts_of,
    has_gate_for_a_stack,
    is_stack,
    may_route,
    without_router,
)
from moe_plugin.attach.discovery.module_names import aliases, holds, inner_first, inside
from moe_plugin.attach.discovery.ranking_calls import NAMES, Use
from moe_plugin.attach.discovery.surroundings import Surroundings
from moe_plugin.attach.discovery.understand import NoStyle, Style, understand
from moe_plugin.errors import AttachError


@dataclass(frozen=True)
class Found:
    """A router found in a model, with what balancing needs to know of it."""

    name: str
    module: nn.Module
    num_experts: int
    top_k: int
    kind: str = "topk"
    use: Use = field(default_factory=Use)
    bias_owner: nn.Module | None = None
    bias_name: str | None = None
    zeros_masked: bool = False
    proven: bool = False
    adapter: Adapter | None = None


@dataclass
class Findings:
    """All that was found in a model, by module name.

    Attributes:
        routers: What can be balanced.
        refused: Routers that cannot, and why.
        strangers: Modules with experts whose routing nobody understood, and why.
    """

    routers: dict[str, Found] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    strangers: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """All of them."""
        return [*self.routers, *self.refused, *self.strangers]

    def only(self, wanted: Callable[[str], bool]) -> Findings:
        """Return those whose name is wanted."""
        return Findings(
            {name: found for name, found in self.routers.items() if wanted(name)},
            {name: reason for name, reason in self.refused.items() if wanted(name)},
            {name: reason for name, reason in self.strangers.items() if wanted(name)},
        )


def find_routers(model: nn.Module, adapters: Sequence[Adapter] = ()) -> list[Found]:
    """Return all routing sites of a model, in the order of its modules.

    Raises:
        AttachError: If there is none, or experts have a router that nobody understood.
    """
    return checked(survey(model, adapters), model)


def checked(findings: Findings, model: nn.Module) -> list[Found]:
    """Return the routers of ``findings``.

    Raises:
        AttachError: If there is none, or experts have a router that nobody understood.
    """
    kind = type(model).__name__
    if findings.strangers:
        raise AttachError(f"{kind} cannot be balanced as it is: {_listed(findings.strangers)}. {_FIX}")
    if not findings.routers and findings.refused:
        raise AttachError(f"{kind} cannot be balanced: {_listed(findings.refused)}.")
    if not findings.routers:
        seen = [
            f"{name or '(the model itself)'}: {type(m).__name__}"
            for name, m in model.named_modules()
            if uses(type(m), _TOP_K)
        ]
        raise AttachError(
            f"No router was found in {kind}: a module that ranks experts, with experts near it. {_FIX} "
            f"Modules that call topk: {', '.join(seen) or 'none'}."
        )
    return list(findings.routers.values())


_TOP_K = frozenset({"topk"})
_FIX = "Write an Adapter for that block and pass it in 'adapters', or leave it out with 'sites'."


def _listed(reasons: dict[str, str]) -> str:
    return "; ".join(f"{name!r}: {reason}" for name, reason in reasons.items())


def survey(model: nn.Module, adapters: Sequence[Adapter] = ()) -> Findings:
    """Find every router of the model, and every block of experts without one.

    Raises:
        AttachError: If modules of the model have no parameters yet.
    """
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise AttachError(f"{lazy[0]!r} has no size yet. Run the model on one batch before it is balanced.")
    findings = Findings()
    doubts, unseen = [], []
    styles: dict[Any, Style | NoStyle | None] = {}
    adapted = _adapted(model, adapters, findings)
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
        elif uses(type(module), NAMES) or experts_of(module) or has_gate_for_a_stack(module):
            around = Surroundings.of(model, name)
            key = structure(around)
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


def _adapted(model: nn.Module, adapters: Sequence[Adapter], findings: Findings) -> list[str]:
    """Note the blocks that an adapter names; returns their names."""
    names: list[str] = []
    for name, module in model.named_modules():
        adapter = adapter_for(module, adapters)
        if adapter is None or inside(name, names):
            continue
        names.append(name)
        if adapter.refused:
            findings.refused[name] = f"{type(module).__name__} {adapter.refused}"
        else:
            num_experts, top_k = adapter.number(module, "num_experts"), adapter.number(module, "top_k")
            findings.routers[name] = Found(
                name, module, num_experts, top_k, kind="adapter", proven=True, adapter=adapter
            )
    return names


def _note(findings: Findings, name: str, around: Surroundings, style: Style | NoStyle | None) -> None:
    module = around.modules[0]
    if isinstance(style, NoStyle):
        where = findings.strangers if style.adaptable else findings.refused
        where[name] = f"{type(module).__name__} {style.reason}"
    elif style is not None:
        owner, bias_name = around.tensors()[style.bias] if style.bias is not None else (None, None)
        findings.routers[name] = Found(
            name=name,
            module=module,
            num_experts=style.num_experts,
            top_k=style.top_k,
            kind=style.kind,
            use=style.use,
            bias_owner=owner,
            bias_name=bias_name,
            zeros_masked=style.zeros_masked,
            proven=style.proven,
        )


def _note_strangers(model: nn.Module, doubts: Sequence[str], findings: Findings) -> None:
    """Note blocks of experts without a router, and leave modules out that may be such blocks."""
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
    """Leave modules out that are of a router's class, but were not seen to select, as gates inside gates."""
    kinds = {type(found.module): name for name, found in reversed(findings.routers.items())}
    for name in unseen:
        kind = type(model.get_submodule(name))
        if kind in kinds:
            findings.refused[name] = (
                f"{kind.__name__} is the class of router {kinds[kind]!r}, but was not seen to select one set of "
                "experts for each token here. If it does, write an Adapter for it and pass it in 'adapters'"
            )


def structure(around: Surroundings) -> Any:
    """Return equal for modules that are built and placed alike, such as the routers of a model's layers."""
    kinds = tuple(type(module) for module in around.modules)
    numbers = tuple(
        (name, value)
        for module in around.modules[:2]
        for name, value in vars(module).items()
        if isinstance(value, (int, float, str)) and "layer" not in name
    )
    shapes = tuple(
        (key, tuple(getattr(owner, name).shape)) for key, (owner, name) in around.tensors().items()
    )
    last = [name.rpartition(".")[2] for name, _ in around.path]
    places = tuple(
        "" if part.isdigit() else part for part in last
    )  # layers are alike, a block's parts are not
    return kinds, places, numbers, shapes, tuple(around.widths()), frozenset(around.expert_counts())
