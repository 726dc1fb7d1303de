"""Make a host's router report what it selects, by swapping its class or the callable on the instance."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from moe_plugin.attach.adapter import Adapter
from moe_plugin.attach.discovery.probing.trace import Trace
from moe_plugin.attach.selection import Selection
from moe_plugin.attach.site import Site
from moe_plugin.attach.steering.class_swap import Mixin, swap_, unswap_
from moe_plugin.attach.steering.intercept import Intercept, select
from moe_plugin.errors import EffectError


class _BalancedRouter(Mixin):
    """Runs the host's own forward and reports to the site what it selected."""

    _moe_site: Site

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _watched(self, super().forward, args, kwargs)  # pyright: ignore


class _BalancedForward:
    """Replaces a ``forward`` on the instance, as hooks of other libraries leave it: its class's is not called."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module = module
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _watched(self.module, self.forward, args, kwargs)


class _AdaptedMethod:
    """Replaces a block's routing method by the routing of its adapter."""

    def __init__(self, module: nn.Module, adapter: Adapter) -> None:
        self.module = module
        self.adapter = adapter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        site: Site = self.module._moe_site  # pyright: ignore[reportAssignmentType]
        seen: list[Selection] = []

        def select_experts(scores_TE: Tensor, k: int, counts: bool = True) -> tuple[Tensor, Tensor]:
            selection = select(scores_TE, k, site.bias)
            seen.extend([selection] * counts)
            return selection.selected_TK, selection.expert_ids_TK

        assert self.adapter.route is not None, "a refused block is never attached"
        output = self.adapter.route(self.module, select_experts, *args, **kwargs)
        training, compiling = self.module.training, torch.compiler.is_compiling()
        site.record_(seen, output, training=training, compiling=compiling)
        return output


def watch_(site: Site) -> None:
    """Make the site's router report to it."""
    module, adapter = site.router, site.style.adapter
    module.__dict__["_moe_site"] = site
    if adapter is not None:
        module.__dict__[adapter.method] = _AdaptedMethod(module, adapter)
    elif "forward" in module.__dict__:
        module.__dict__["forward"] = _BalancedForward(module, module.__dict__["forward"])
    else:
        swap_(module, _BalancedRouter)


def unwatch_(module: nn.Module) -> None:
    """Undo `watch_`."""
    for name, value in list(module.__dict__.items()):
        if isinstance(value, _AdaptedMethod):
            del module.__dict__[name]
            break
        if isinstance(value, _BalancedForward):
            module.__dict__[name] = value.forward
            break
    else:
        unswap_(module, _BalancedRouter)
    del module.__dict__["_moe_site"]


def _watched(module: Any, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    site: Site = module._moe_site
    compiling = torch.compiler.is_compiling()
    if not (site.is_proven or compiling):
        forward = _proving(site, forward)
    closely = not compiling and site.counters.looks_closely
    bias = site.bias_place.tensor()
    version = bias._version if closely else 0
    seen: list[Selection] = []
    guard = _refuse_to_be_recomputed if closely else None
    with Intercept(site.style, None if site.host_owns_bias else bias, seen, guard):
        output = forward(*args, **kwargs)
    if closely and (bias._version != version or site.bias_place.tensor() is not bias):
        raise EffectError(
            f"Router {site.name!r} updates its own {site.bias_place.name!r} during forward, which conflicts with "
            "balancing. Switch the model's own balancing off, or leave the router out with 'sites'."
        )
    site.record_(seen, output, training=module.training, compiling=compiling)
    return output


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


def _proving(site: Site, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward with a check that the host's own bias reaches its selection."""

    def proving(*args: Any, **kwargs: Any) -> Any:
        trace = Trace({"bias": site.bias_place.tensor()})
        with trace:
            output = forward(*args, **kwargs)
        is_added = any("bias" in each.added for each in trace.rankings)
        if site.host_owns_bias and trace.rankings and not is_added:
            raise EffectError(
                f"Router {site.name!r} owns {site.bias_place.name!r}, but does not add it to the scores by which it "
                "selects experts, so balancing would have no effect. Write an Adapter for it and pass it in "
                "'adapters', or leave it out with 'sites'."
            )
        site.is_proven = True
        return output

    return proving
