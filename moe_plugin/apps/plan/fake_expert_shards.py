"""Expert parallelism on fake tensors: the experts of one rank, and as many rows as it receives.

Shape legend: T tokens, D model width, K experts selected per token, P = T * K token-expert pairs, Q rows received.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from moe_plugin.attach.discovery.routed_experts import RoutedExperts, find_routed_experts
from moe_plugin.errors import ConfigError
from moe_plugin.experts.grouped import GroupedExperts
from moe_plugin.experts.kernels.dispatch import combine, plan_dispatch
from moe_plugin.experts.kernels.dtypes import compute_dtype
from moe_plugin.types import Routing


def spread_experts_(model: nn.Module, ranks: int, excess: float = 0.0) -> list[nn.Module]:
    """Leave each expert layer the experts of one rank, and make it work on the rows that the rank would receive.

    The memory is that of `moe_plugin.experts.parallel.parallelize_experts_`. Rows are not exchanged: fake tensors do
    not show how many would travel.

    Args:
        model: A model on the meta device.
        ranks: Ranks that hold all experts together.
        excess: MaxVio of the rank: it receives (1 + excess) times the mean number of rows.

    Returns:
        The expert layers.

    Raises:
        ConfigError: The experts cannot be spread over so many ranks.
    """
    layers = find_routed_experts(model)
    for routed in layers:
        _check(routed, ranks)
        _Spread(routed.module, ranks, excess)
    return [routed.module for routed in layers]


def _check(routed: RoutedExperts, ranks: int) -> None:
    if routed.num_experts % ranks:
        raise ConfigError(
            "expert_parallel", f"must divide the experts of a layer ({routed.num_experts})", ranks
        )
    if any(p.shape[0] != routed.num_experts for p in routed.module.parameters(recurse=False)):
        kind = type(routed.module).__name__
        raise ConfigError(
            "layouts", f"must not have ep for {kind}: its experts are not stacked in 3-D parameters"
        )


class _Spread:
    """The forward of an expert layer in place of its own."""

    def __init__(self, experts: nn.Module, ranks: int, excess: float) -> None:
        self._experts, self._forward, self._excess = experts, experts.forward, excess
        self._signature = inspect.signature(experts.forward)
        self._num_experts: int = experts.num_experts  # pyright: ignore[reportAttributeAccessIssue]
        for name, whole in list(experts.named_parameters(recurse=False)):
            part = nn.Parameter(whole.detach()[: len(whole) // ranks], requires_grad=whole.requires_grad)
            experts.register_parameter(name, part)
        experts.num_experts = self._num_experts // ranks  # pyright: ignore[reportArgumentType]
        experts.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        x_TD, *routing = self._signature.bind(*args, **kwargs).args
        ours = isinstance(self._experts, GroupedExperts)
        expert_ids_TK, weights_TK = routing[0][1::-1] if ours else routing
        x_TD = x_TD.to(compute_dtype(x_TD)) if ours else x_TD
        dispatch = plan_dispatch(expert_ids_TK, self._num_experts)
        x_PD = x_TD.index_select(0, dispatch.token_ids_P)
        x_QD = _Travel.apply(x_PD, round(len(x_PD) * (1 + self._excess)))
        ids_Q1, ones_Q1 = expert_ids_TK.new_zeros(len(x_QD), 1), x_QD.new_ones(len(x_QD), 1)
        own = (Routing(ones_Q1, ids_Q1, ones_Q1),) if ours else (ids_Q1, ones_Q1)
        y_PD = _Travel.apply(self._forward(x_QD, *own), len(x_PD))
        return combine(y_PD, weights_TK.to(y_PD.dtype), dispatch)


class _Travel(torch.autograd.Function):
    """Rows sent, and rows received in their place."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, received: int) -> Tensor:
        ctx.sent = len(rows)
        return rows.new_empty(received, *rows.shape[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].new_empty(ctx.sent, *gradients[0].shape[1:]), None
