"""Balance the experts of any model: one call for a plain training loop, and what the callback drives."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch.distributed as dist
from torch import nn

from moe_plugin.attach.adapter import Adapter
from moe_plugin.attach.balanced_model import BalancedModel, find_balanced
from moe_plugin.attach.discovery.survey import Findings, checked, survey
from moe_plugin.attach.frozen_routers import FrozenRouters, check_frozen_routers, keeps_bias
from moe_plugin.attach.fused.fusible import Experts, check_experts, find_fusible
from moe_plugin.attach.fused.host_forward import Fusion, fuse_
from moe_plugin.attach.steering.attach import attach_
from moe_plugin.attach.token_mask import TokenMask
from moe_plugin.balancing.rules import Proportional, Rule
from moe_plugin.balancing.schedule import RateSchedule
from moe_plugin.errors import AttachError

__all__ = ["DEFAULT_RULE", "BalancedModel", "Rules", "Sites", "balance_", "find_balanced"]

_LOG = logging.getLogger(__name__)

Rules = Rule | Mapping[str, Rule] | None
Sites = str | Sequence[str] | Callable[[str], bool] | None
DEFAULT_RULE = Proportional()


def balance_(
    model: nn.Module,
    rule: Rules = DEFAULT_RULE,
    sites: Sites = None,
    *,
    schedule: RateSchedule = RateSchedule(),  # noqa: B008 (frozen)
    mask: str | None = "attention_mask",
    adapters: Sequence[Adapter] = (),
    frozen_routers: FrozenRouters = "auto",
    experts: Experts = None,
    process_group: dist.ProcessGroup | None = None,
) -> BalancedModel:
    """Balance the experts of ``model`` in place, without an auxiliary loss (arXiv 2408.15664).

    Finds every routing site, checks all of them, and only then attaches. Calling it again returns the same object.
    Call ``update()`` on it after each optimizer step; the Lightning callback does so by itself.

    Args:
        model: Any module that holds MoE blocks.
        rule: How biases follow the load; a mapping from glob on the site's name to rule gives each site the first
            that matches; None only observes the load.
        sites: Which routers to balance: a glob, several, or a predicate on the module name; None takes all.
        schedule: Factor on the rate by update number.
        mask: Forward argument that marks real tokens (B, S); None counts every token.
        adapters: How blocks route that select experts in a way of their own.
        frozen_routers: What becomes of the bias where the router is frozen now: 'balance' it, 'keep' it, or 'auto':
            keep it where the model owns one that is not zero, balance it elsewhere.
        experts: 'fused' computes the experts of these routers by `moe_plugin.experts` instead of the model's own code,
            on the same parameters; all must be SwiGLU in stacked 3-D weights. None leaves the model's own.
        process_group: The data-parallel ranks; None is all ranks of the default group.

    Raises:
        AttachError: If no router is found or matches, the model is balanced with other settings already, or some of
            its experts cannot be fused.
        ConfigError: If 'frozen_routers' is none of the three, 'experts' neither of the two, or 'fused' with kernels
            that cannot run.
    """
    check_frozen_routers(frozen_routers)
    check_experts(experts)
    settings = (rule, sites, schedule, mask, tuple(adapters), frozen_routers, experts)
    existing = find_balanced(model)
    if existing is not None:
        if existing.settings != settings:
            raise AttachError(
                "The model is balanced already, with other settings. Call remove() on it first."
            )
        return existing
    _refuse_balanced_parts(model)
    findings = _chosen(model, adapters, sites)
    found = checked(findings, model)
    rules = [_rule_for(router.name, rule) for router in found]
    fusible = find_fusible(model, found) if experts == "fused" else {}
    token_mask = TokenMask(mask or "")
    token_mask.watch_(model)
    attached = [attach_(router, token_mask) for router in found]
    kept = [keeps_bias(site, frozen_routers) for site in attached]
    rules = [None if keep else rule for keep, rule in zip(kept, rules, strict=True)]
    balanced = BalancedModel(model, attached, rules, schedule, process_group, settings)
    balanced.refused = dict(findings.refused)
    varies = any(site.dynamic is not None for site in attached)
    for name, (layer, layout) in fusible.items():
        fuse_(layer, Fusion(layout, leaves_out_zeros=varies))
        balanced.fused[name] = layer
    return balanced


def _wanted(name: str, sites: Sites) -> bool:
    if sites is None:
        return True
    if callable(sites):
        return sites(name)
    return any(fnmatchcase(name, glob) for glob in ([sites] if isinstance(sites, str) else sites))


def _chosen(model: nn.Module, adapters: Sequence[Adapter], sites: Sites) -> Findings:
    findings = survey(model, adapters)
    chosen = findings.only(lambda name: _wanted(name, sites))
    if not chosen.names and findings.names:
        raise AttachError(f"'sites' must match a router, got {sites!r}; there are {findings.names}.")
    for name, reason in chosen.refused.items():
        _LOG.warning("Not balanced: %s, %s.", name, reason)
    return chosen


def _rule_for(name: str, rule: Rules) -> Rule | None:
    if not isinstance(rule, Mapping):
        return rule
    for glob, candidate in rule.items():
        if fnmatchcase(name, glob):
            return candidate
    raise AttachError(f"'rule' must have a glob that matches router {name!r}, got {list(rule)}.")


def _refuse_balanced_parts(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if find_balanced(module) is not None or "_moe_site" in module.__dict__:
            raise AttachError(f"{name!r} inside the model is balanced already. Call remove() on that first.")
