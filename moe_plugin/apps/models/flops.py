"""Floating-point operations per token, from the shapes of a model's parameters."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from moe_plugin.apps.models.transformer import Transformer
from moe_plugin.attach.discovery.routed_experts import RoutedExperts


def matmul_flops(model: nn.Module, routed: Iterable[RoutedExperts]) -> int:
    """Return forward operations per token in matrix products with weights: two per weight that the token meets.

    Each parameter of two or more dimensions is a weight. Embedding look-ups cost nothing; the output projection
    counts, tied or not; top_k of num_experts routed experts count.

    Args:
        model: Any model.
        routed: Its routed experts, as `find_routed_experts` returns them.
    """
    share = {
        id(module): (experts.top_k, experts.num_experts)
        for experts in routed
        for module in experts.module.modules()
    }
    flops = 0
    for module in model.modules():
        top_k, num_experts = share.get(id(module), (1, 1))
        flops += int(2 * _num_weights(module) * top_k // num_experts)
    return flops


def attention_flops(model: nn.Module, context_length: int) -> int:
    """Return forward operations per token in attention scores and their weighted sum.

    Attention modules are those that have a head width and a number of heads.

    Args:
        model: Any model.
        context_length: Length of the sequences: a token sees (context_length + 1) / 2 positions on average.
    """
    widths = sum(sum(_attention_widths(module)) for module in model.modules())
    return widths * (context_length + 1)


def _num_weights(module: nn.Module) -> int:
    if isinstance(module, nn.Embedding):
        return 0
    if isinstance(module, Transformer) and module.head is None:
        return module.embedding.weight.numel()
    return sum(parameter.numel() for parameter in module.parameters(recurse=False) if parameter.ndim >= 2)


def _attention_widths(module: nn.Module) -> tuple[int, int]:
    """Return width of all heads together in scores and in values; (0, 0) if the module is no attention."""
    config = getattr(module, "config", None)
    num_heads = getattr(module, "num_heads", None) or getattr(config, "num_attention_heads", None)
    score_width = getattr(module, "qk_head_dim", None) or getattr(module, "head_dim", None)
    if not isinstance(num_heads, int) or not isinstance(score_width, int):
        return 0, 0
    value_width = getattr(module, "v_head_dim", None) or score_width
    return num_heads * score_width, num_heads * int(value_width)
