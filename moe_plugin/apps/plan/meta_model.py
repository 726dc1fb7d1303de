"""A model as it would be trained: its precision, checkpointing, and how its routers choose."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import get_args

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_plugin.apps.models.flops import matmul_flops
from moe_plugin.apps.plan.choices import Precision
from moe_plugin.apps.plan.nodes_per_token import Selection
from moe_plugin.attach.discovery.routed_experts import RoutedExperts, find_routed_experts
from moe_plugin.attach.discovery.understand import GROUP_COUNT_NAMES
from moe_plugin.balancing.counts import EXTRA_SLOTS
from moe_plugin.errors import ConfigError
from moe_plugin.sharding import find_layers

_OPEN_GROUPS_NAMES = ("top_k_groups", "topk_group", "topk_groups")


def prepare_(model: nn.Module, precision: Precision, *, activation_checkpointing: bool) -> nn.Module:
    """Cast a model on the meta device as Lightning's precision would, and checkpoint its layers.

    Args:
        model: Changed in place.
        precision: Lightning's name of it.
        activation_checkpointing: Keep only the inputs of each layer for the backward.

    Raises:
        ConfigError: The precision is none of those.
    """
    if precision not in get_args(Precision):
        raise ConfigError("precision", f"must be one of {', '.join(get_args(Precision))}", precision)
    if precision == "bf16-true":
        model.to(torch.bfloat16)
    if activation_checkpointing:
        for layer in find_layers(model):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    return model


def autocast_of(precision: Precision) -> torch.dtype | None:
    """Return the dtype of the autocast under a precision; None for none."""
    return torch.bfloat16 if precision == "bf16-mixed" else None


def routed_experts(model: nn.Module) -> list[RoutedExperts]:
    """Return the expert layers.

    Raises:
        ConfigError: There are none.
    """
    routed = find_routed_experts(model)
    if not routed:
        raise ConfigError("model", "must be a mixture of experts", type(model).__name__)
    return routed


def selection_of(model: nn.Module) -> Selection:
    """Return how routers choose: by the first expert layer, and the groups that a module or configuration names."""
    routed = routed_experts(model)[0]
    groups = _first_number(model, GROUP_COUNT_NAMES)
    opened = _first_number(model, _OPEN_GROUPS_NAMES)
    return Selection(routed.num_experts, math.ceil(routed.top_k), groups or 1, opened or groups or 1)


def expert_share(model: nn.Module, forward_flops: int) -> float:
    """Return the share of products with weights of routed experts in a forward.

    Args:
        model: On the meta device.
        forward_flops: All operations of a token's forward.
    """
    routed = find_routed_experts(model)
    return sum(matmul_flops(e.module, []) * e.top_k // e.num_experts for e in routed) / forward_flops


def bias_count_bytes(routed: Iterable[RoutedExperts]) -> int:
    """Return the bytes of the one all-reduce of `BalancedModel.update`: the counts of all layers, int64."""
    return 8 * sum(experts.num_experts + EXTRA_SLOTS for experts in routed)


def width_of(model: nn.Module) -> int:
    """Return the width of hidden states: that of the largest embedding."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return max(embeddings, key=lambda embedding: embedding.num_embeddings).embedding_dim


def _first_number(model: nn.Module, names: Iterable[str]) -> int | None:
    return next(_numbers(model, tuple(names)), None)


def _numbers(model: nn.Module, names: tuple[str, ...]) -> Iterator[int]:
    for module in model.modules():
        for owner in (module, getattr(module, "config", None)):
            yield from (value for name in names if isinstance(value := getattr(owner, name, None), int))
