"""Make a host's router report what it selects, by swapping its class or the callable on the instance."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import FrameType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import TransformType, get_interpreter_stack, maybe_current_level
from torch._compile import _disable_dynamo
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import checkpoint

from moe_plugin.attach.adapter import Adapter
from moe_plugin.attach.discovery.probing.trace import tensors_in
from moe_plugin.attach.discovery.routing_style import Plan, Role
from moe_plugin.attach.selection import Selection
from moe_plugin.attach.site import FIX, Site
from moe_plugin.attach.steering.class_swap import Mixin, swap_, unswap_
from moe_plugin.attach.steering.intercept import Intercept, select
from moe_plugin.attach.steering.proof import prove
from moe_plugin.attach.steering.trial import Trial, learn
from moe_plugin.errors import EffectError

_LOG = logging.getLogger(__name__)


class _BalancedRouter(Mixin):
    """Runs the host's own forward and reports to the site what it selected."""

    _moe_site: Site

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _watched(self, super().forward, args, kwargs)  # pyright: ignore


class _BalancedForward:
    """Replaces a ``forward`` on the instance, as hooks of other libraries leave it: its class's is not called."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module = module
        self.original = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _watched(self.module, self.original, args, kwargs)


class _AdaptedMethod:
    """Replaces a block's routing method by the routing of its adapter."""

    def __init__(self, module: nn.Module, adapter: Adapter, name: str) -> None:
        self.module = module
        self.adapter = adapter
        self.original = getattr(module, name)
        self.is_new = name not in vars(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        site: Site = self.module._moe_site  # pyright: ignore[reportAssignmentType]
        seen: list[Selection] = []

        def select_experts(
            scores_TE: Tensor, k: int, plain_TE: Tensor | None = None, *, counts: bool = True
        ) -> tuple[Tensor, Tensor]:
            selection = select(scores_TE, k, site.bias)
            if counts:
                seen.append(selection if plain_TE is None else selection._replace(ranked_TE=plain_TE))
            return selection.selected_TK, selection.expert_ids_TK

        assert self.adapter.route is not None, "a refused block is never attached"
        output = self.adapter.route(self.module, select_experts, *args, **kwargs)
        training, compiling = self.module.training, torch.compiler.is_compiling()
        site.record_(seen, output, training=training, compiling=compiling)
        return output


def watch_(site: Site) -> None:
    """Make the site's router report to it."""
    module, adapter = site.router, site.style.adapter
    own = module.__dict__
    own["_moe_site"] = site
    if adapter is not None:
        own |= {name: _AdaptedMethod(module, adapter, name) for name in adapter.places(module)}
    elif "forward" in own:
        own["forward"] = _BalancedForward(module, own["forward"])
    else:
        swap_(module, _BalancedRouter)


def host_forward(module: nn.Module) -> Callable[..., Any]:
    """Return the host's own forward of a watched router."""
    own = module.__dict__.get("forward")
    return own.original if isinstance(own, _BalancedForward) else super(_BalancedRouter, module).forward  # pyright: ignore


def unwatch_(module: nn.Module) -> None:
    """Undo `watch_`, also in attributes to which later hooks have moved what it put in place."""
    if isinstance(module, _BalancedRouter):
        unswap_(module, _BalancedRouter)
    own = module.__dict__
    for name, value in list(own.items()):
        if isinstance(value, _AdaptedMethod) and value.is_new and name == value.adapter.method:
            del own[name]
        elif isinstance(value, (_AdaptedMethod, _BalancedForward)):
            own[name] = value.original
        elif getattr(value, "__func__", None) is _BalancedRouter.forward:
            own[name] = MethodType(type(module).forward, module)
    del own["_moe_site"]


def _watched(module: Any, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    site: Site = module._moe_site
    if module is not site.router:
        _refuse_replica(site)
    compiling = torch.compiler.is_compiling()
    if not compiling and (maybe_current_level() is not None or torch._C._is_tracing()):
        _refuse_tracing(site)
    plan = site.plans.get((module.training, torch.is_grad_enabled()))
    if plan is None:
        plan = site.style.plans[module.training]
        if not compiling:
            plan = _learnt(site, forward, args, kwargs, plan)
        elif not plan.certain or (module.training and not (site.is_verified or site.is_rehearsed)):
            return _watched_at_first(site, forward, args, kwargs)
    closely = not compiling and site.counters.looks_closely
    bias = site.bias_place.tensor()
    version = bias._version if closely else 0
    seen: list[Selection] = []
    calls: list[Role] = []
    guard = _refuse_to_be_recomputed if closely else None
    with Intercept(site.style, plan, None if site.host_owns_bias else bias, seen, calls, guard):
        output = forward(*args, **kwargs)
    if calls and plan.roles and len(calls) != len(plan.roles):
        _refuse_other_calls(site, len(plan.roles), len(calls))
    if closely and (bias._version != version or site.bias_place.tensor() is not bias):
        raise EffectError(
            f"Router {site.name!r} updates its own {site.bias_place.name!r} during forward, which conflicts with "
            "balancing. Switch the model's own balancing off, or leave the router out with 'sites'."
        )
    site.record_(seen, output, training=module.training, compiling=compiling)
    return output


def _watched_at_first(site: Site, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run a router of which too little is known to compile it; what it shows is compiled in the next forward.

    Raises:
        EffectError: If it is exported without dynamo, where no code can run uncompiled.
    """
    if torch.compiler.is_dynamo_compiling():
        return _run_a_forward_before_compiling_with_fullgraph(site.router, forward, args, kwargs)
    raise EffectError(
        f"Router {site.name!r} must run once in this mode before it is exported. Run a forward first."
    )


@_disable_dynamo
def _run_a_forward_before_compiling_with_fullgraph(
    module: Any, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
) -> Any:
    """Run a router uncompiled; dynamo's error names this function if a graph must be whole."""
    return _watched(module, forward, args, kwargs)


def _learnt(
    site: Site, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any], found: Plan
) -> Plan:
    """Return what the router's rankings are for, by its first real forward in this mode."""
    if _has_no_data(args, kwargs):
        if found.certain or maybe_current_level() is None:
            return found
        raise EffectError(
            f"Router {site.name!r} must run once before torch.func transforms it. Run a forward first."
        )
    trial, training = Trial(site, forward, args, kwargs), site.router.training
    plan = learn(trial)
    if plan is None:
        return found
    if plan.certain:
        site.plans[training, torch.is_grad_enabled()] = plan
    if training and not site.is_verified:
        doubt = prove(trial, plan)
        if doubt:
            _LOG.warning("Router %r %s: gate weights not verified.", site.name, doubt)
        site.is_verified = plan.certain
    return plan


def _has_no_data(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Return whether a forward is traced or transformed, or may not wait for the device."""
    if any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors_in((args, kwargs))):
        return True
    captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return captured or maybe_current_level() is not None


def _refuse_tracing(site: Site) -> None:
    """Refuse what hides the values that are selected.

    Raises:
        EffectError: Under `torch.jit.trace` and `torch.func.vmap`.
    """
    stack = get_interpreter_stack() or ()
    if torch._C._is_tracing() or any(each.key() == TransformType.Vmap for each in stack):
        raise EffectError(
            f"Router {site.name!r} must not run in torch.jit.trace or torch.func.vmap while it is balanced: they hide "
            "what it selects. Call remove() on what balance_ returned first; torch.export works."
        )


def _refuse_replica(site: Site) -> None:
    """Refuse a copy that shares its bias and its counters with the model, as `torch.nn.DataParallel` makes them.

    Raises:
        EffectError: Always.
    """
    raise EffectError(
        f"Router {site.name!r} must run in the model that is balanced, but a shallow copy of it ran, as "
        "torch.nn.DataParallel makes them. Use DistributedDataParallel, or copy.deepcopy the whole model."
    )


def _refuse_other_calls(site: Site, expected: int, seen: int) -> None:
    """Refuse a forward with more or fewer rankings than the router had when it was looked at.

    Raises:
        EffectError: Always.
    """
    raise EffectError(
        f"Router {site.name!r} must rank its experts {expected} times in a forward, as in its first one in this mode, "
        f"but it did {seen} times, so it is not known which of them select. {FIX}"
    )


def _refuse_to_be_recomputed() -> None:
    """Refuse a selection that activation checkpointing would repeat in backward, where it is not intercepted.

    Raises:
        EffectError: If the router checkpoints the part of its own forward that selects.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _watched.__code__:
        if frame.f_code.co_filename == checkpoint.__file__:
            raise EffectError(
                "A router checkpoints the part of its own forward that selects experts, so it would select others when "
                "that part is recomputed. Checkpoint the whole block from outside, write an Adapter for its selecting "
                "method and pass it in 'adapters', or leave it out with 'sites'."
            )
        frame = frame.f_back
