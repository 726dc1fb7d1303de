"""Find the routing sites of a model from its structure, not from a list of model names.

A router is the innermost module whose own code calls ``topk`` and that knows how many experts there are and
how many a token gets. A model that appears tomorrow with an ordinary router is found without an edit here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import CodeType, FunctionType

from torch import Tensor, nn

from moe_plugin.errors import AttachError

EXPERT_COUNT_NAMES = (
    "num_experts",
    "n_routed_experts",
    "num_local_experts",
    "n_experts",
    "num_routed_experts",
    "n_expert",
    "moe_num_experts",
)
TOP_K_NAMES = (
    "top_k",
    "num_experts_per_tok",
    "topk",
    "n_expert_per_token",
    "experts_per_token",
    "num_experts_per_token",
    "moe_k",
    "moe_topk",
    "num_selected_experts",
)
BIAS_NAMES = ("e_score_correction_bias", "expert_bias", "balancing_biases", "score_bias")
CALL_DEPTH = 2
"""How many plain function calls away from a router's class its ``topk`` may be."""
GROUP_COUNT_NAMES = ("num_groups", "num_group", "n_group", "num_expert_groups", "n_groups")


@dataclass(frozen=True)
class Found:
    """A router found in a model, with the numbers that balancing needs."""

    name: str
    module: nn.Module
    num_experts: int
    top_k: int
    bias_owner: nn.Module | None
    bias_name: str | None
    num_groups: int


def find_routers(model: nn.Module) -> list[Found]:
    """All routing sites of a model, in the order of its modules.

    Raises:
        AttachError: If there is none; the message lists what looked like a router.
    """
    calling = {name: module for name, module in model.named_modules() if _calls_topk(type(module))}
    found = [_describe(model, name, calling[name]) for name in calling if not _has_inner(name, calling)]
    routers = [router for router in found if router is not None]
    if not routers:
        seen = ", ".join(
            f"{name or '(the model itself)'}: {type(module).__name__}" for name, module in calling.items()
        )
        raise AttachError(
            f"No router was found in {type(model).__name__}: a module that calls topk and has one of "
            f"{EXPERT_COUNT_NAMES} and one of {TOP_K_NAMES}. Modules that call topk: {seen or 'none'}."
        )
    return routers


def _has_inner(name: str, names: dict[str, nn.Module]) -> bool:
    prefix = f"{name}." if name else ""
    return any(other != name and other.startswith(prefix) for other in names)


def _describe(model: nn.Module, name: str, module: nn.Module) -> Found | None:
    parent = model.get_submodule(name.rpartition(".")[0]) if name else module
    num_experts = _number((module, parent), EXPERT_COUNT_NAMES)
    top_k = _number((module, parent), TOP_K_NAMES)
    if num_experts is None or top_k is None:
        return None
    bias = _owned_bias((module, parent), num_experts)
    return Found(
        name=name,
        module=module,
        num_experts=num_experts,
        top_k=top_k,
        bias_owner=bias[0] if bias else None,
        bias_name=bias[1] if bias else None,
        num_groups=_number((module, parent), GROUP_COUNT_NAMES) or 1,
    )


def _number(modules: tuple[nn.Module, ...], names: tuple[str, ...]) -> int | None:
    for module in modules:
        for holder in (module, getattr(module, "config", None)):
            for name in names:
                value = getattr(holder, name, None)
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
    return None


def _owned_bias(modules: tuple[nn.Module, ...], num_experts: int) -> tuple[nn.Module, str] | None:
    for module in modules:
        for name in BIAS_NAMES:
            value = getattr(module, name, None)
            if isinstance(value, Tensor) and value.shape == (num_experts,):
                return module, name
    return None


@cache
def _calls_topk(kind: type) -> bool:
    """Whether the class's own code, or a plain function that it calls, uses ``topk``."""
    return any(_reaches_topk(function, CALL_DEPTH) for function in _functions(kind))


def _functions(kind: type) -> Iterator[FunctionType]:
    """The functions of a class and of its bases up to ``nn.Module``, decorators looked through."""
    for base in kind.__mro__:
        if base is nn.Module:
            return
        for member in vars(base).values():
            function = inspect.unwrap(member) if callable(member) else getattr(member, "__func__", None)
            if isinstance(function, FunctionType):
                yield function


def _reaches_topk(function: FunctionType, depth: int) -> bool:
    names = _names_in(function.__code__)
    if "topk" in names:
        return True
    called = (function.__globals__.get(name) for name in names) if depth else ()
    return any(isinstance(inner, FunctionType) and _reaches_topk(inner, depth - 1) for inner in called)


def _names_in(code: CodeType) -> set[str]:
    nested = (_names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*nested)
