"""Balance the experts of any model: one call for a plain training loop, and what the callbacks call."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch.distributed as dist
from torch import nn

from moe_plugin.attach.adapter import Adapter
from moe_plugin.attach.balanced_model import BalancedModel, find_balanced
from moe_plugin.attach.discovery.findings import Findings, routers_to_balance
from moe_plugin.attach.discovery.survey import survey
from moe_plugin.attach.frozen_routers import keeps_bias
from moe_plugin.attach.fused.fusible import find_fusible
from moe_plugin.attach.fused.host_forward import Fusion, fuse_
from moe_plugin.attach.settings import (
    DEFAULT_RULE,
    AuxLoss,
    BalanceSettings,
    Experts,
    FrozenRouters,
    Rules,
    Sites,
)
from moe_plugin.attach.steering.attach import attach_, detach_
from moe_plugin.attach.steering.rehearsal import rehearse_
from moe_plugin.attach.token_mask import TokenMask
from moe_plugin.balancing.schedule import RateSchedule
from moe_plugin.errors import AttachError, BalanceWarning, EffectError
from moe_plugin.losses.in_model import OwnLoss, find_own_losses

_LOG = logging.getLogger(__name__)


def balance_(
    model: nn.Module,
    rule: Rules = DEFAULT_RULE,
    *,
    sites: Sites = None,
    schedule: RateSchedule | None = None,
    mask: str | None = "attention_mask",
    adapters: Sequence[Adapter] = (),
    frozen_routers: FrozenRouters = "auto",
    experts: Experts = None,
    verify: bool = True,
    bias_in_state_dict: bool = False,
    aux_loss: AuxLoss = "warn",
    process_group: dist.ProcessGroup | None = None,
) -> BalancedModel:
    """Balance the experts of ``model`` in place, without an auxiliary loss (arXiv 2408.15664).

    Finds every routing site, checks all of them, and only then attaches. Calling it again returns the same object.
    Call ``update()`` on it after each optimizer step; the Lightning callback does this itself.

    Args:
        model: Any module that holds MoE blocks.
        rule: How biases follow the load, such as ``Sign(rate=0.001)``; a mapping from glob on the router's name to rule
            gives each router the first that matches; None only observes the load.
        sites: Which routers to balance: a glob, several, or a predicate on the module name; None takes all.
        schedule: Factor on the rate by update number; None keeps it constant.
        mask: Forward argument that marks real tokens (B, S); None counts every token.
        adapters: Adapters for blocks whose routing is not found automatically.
        frozen_routers: What to do with the bias of a router that is frozen now: 'balance' it, 'keep' it, or 'auto':
            keep it if the model owns one that is not zero, balance it otherwise.
        experts: 'fused' computes the experts of these routers by `moe_plugin.experts`, on the same parameters; all must
            be SwiGLU in stacked 3-D weights. None keeps the model's own code.
        verify: Whether the first training forward of each router proves, by running it a few times more, that a bias
            moves its selection and nothing else.
        bias_in_state_dict: Whether biases that the model does not own are in its ``state_dict``, as buffers
            ``moe_plugin_bias``: then every checkpoint has them, and only a balanced model loads it strictly.
        aux_loss: What to do with a load-balancing loss that the model adds by itself: 'warn' that two things balance
            it, switch it 'off' until ``remove()``, or 'keep' it.
        process_group: The data-parallel ranks; None is all ranks of the default group.

    Raises:
        AttachError: If no router is found or matches, the model is balanced with other settings already, or some of
            its experts cannot be fused.
        ConfigError: If a setting has a value that is not allowed.
        EffectError: If a router changes a large parameter in its forward.
    """
    settings = BalanceSettings(
        rule,
        sites=sites,
        schedule=schedule,
        mask=mask,
        adapters=adapters,
        frozen_routers=frozen_routers,
        experts=experts,
        verify=verify,
        bias_in_state_dict=bias_in_state_dict,
        aux_loss=aux_loss,
    )
    return balance_as_set_(model, settings, process_group)


def balance_as_set_(
    model: nn.Module, settings: BalanceSettings, process_group: dist.ProcessGroup | None = None
) -> BalancedModel:
    """Balance with settings that have been checked.

    Args:
        model: Any module that holds MoE blocks.
        settings: How to balance.
        process_group: The data-parallel ranks; None is all of the default group.

    Raises:
        AttachError: As for `balance_`.
        EffectError: As for `balance_`.
    """
    existing = find_balanced(model)
    if existing is not None:
        if existing.settings != settings:
            raise AttachError("The model is balanced already with other settings. Call remove() first.")
        return existing
    _refuse_balanced_parts(model)
    findings = _chosen(model, settings)
    found = routers_to_balance(findings, model)
    rules = [settings.rule_for(router.name) for router in found]
    fusible = find_fusible(model, found) if settings.experts == "fused" else {}
    token_mask = TokenMask(settings.mask or "")
    token_mask.watch_(model)
    sites = [attach_(router, token_mask, settings) for router in found]
    try:
        rehearse_(sites)
    except EffectError:
        token_mask.unwatch_()
        for site in sites:
            detach_(site)
        raise
    moved = [
        None if keeps_bias(site, settings.frozen_routers) else rule
        for site, rule in zip(sites, rules, strict=True)
    ]
    balanced = BalancedModel(model, sites, moved, settings, process_group)
    balanced.refused = dict(findings.refused)
    numbers_vary = any(site.level is not None for site in sites)
    for name, (layer, projections) in fusible.items():
        fuse_(layer, Fusion(projections, leaves_out_zeros=numbers_vary))
        balanced.fused[name] = layer
    settle_own_losses_(balanced, find_own_losses(model))
    return balanced


def settle_own_losses_(balanced: BalancedModel, losses: Sequence[OwnLoss]) -> None:
    """Warn of load-balancing losses next to balancing, or switch them off until ``remove()``.

    Args:
        balanced: The model, whose settings say which.
        losses: Its own losses, or those of its trainer.
    """
    if balanced.settings.aux_loss == "off":
        for loss in losses:
            loss.switch_off_()
        balanced.switched_off += losses
    active = [f"{loss.place}={loss.coefficient}" for loss in losses if loss.is_on]
    if active and balanced.settings.aux_loss == "warn" and balanced.settings.rule is not None:
        warnings.warn(
            f"The model also adds a load-balancing loss ({', '.join(active)}), so two things balance its experts. "
            "Switch it off with aux_loss='off', or keep both with aux_loss='keep'.",
            BalanceWarning,
            stacklevel=2,
        )


def _chosen(model: nn.Module, settings: BalanceSettings) -> Findings:
    findings = survey(model, settings.adapters)
    chosen = findings.only(settings.wants)
    idle = [glob for glob in settings.globs if not any(fnmatchcase(name, glob) for name in findings.names)]
    if findings.names and (idle or not chosen.names):
        got = idle if chosen.names else settings.sites
        raise AttachError(f"'sites' must match a router, got {got!r}; there are {findings.names}.")
    for name, reason in chosen.refused.items():
        _LOG.warning("Not balanced: %s, %s.", name, reason)
    return chosen


def _refuse_balanced_parts(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if find_balanced(module) is not None or "_moe_site" in module.__dict__:
            raise AttachError(f"{name!r} inside the model is balanced already. Call remove() on it first.")
