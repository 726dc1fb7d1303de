"""The forward of a layer of experts, some of which are on this rank.

The layer's own forward runs on each rank, on fewer experts and on the rows received.

Shape legend: T tokens, D model width, K experts selected per token, E experts, P = T * K token-expert pairs, Q rows
received.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import functional

from moe_plugin.errors import ConfigError
from moe_plugin.experts.all_to_all import plan_exchange
from moe_plugin.experts.grouped import GroupedExperts
from moe_plugin.experts.kernels.dispatch import combine, plan_dispatch
from moe_plugin.experts.kernels.dtypes import compute_dtype
from moe_plugin.types import Routing


class ExpertParallelForward:
    """Replacement of the forward of a layer of experts, some of which are on this rank."""

    def __init__(self, experts: nn.Module, ranks: DeviceMesh) -> None:
        """Remember the layer as it is, before any wrapper.

        Args:
            experts: The layer.
            ranks: Mesh of one dimension.
        """
        self._experts = experts
        self._class = type(experts)
        self._num_experts: int = experts.num_experts  # pyright: ignore[reportAttributeAccessIssue]
        self._ranks = ranks
        self._signature = inspect.signature(experts.forward)

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the selected experts to each token: (T, D), as the layer's own forward does."""
        x_TD, routing = self._unpack(*self._signature.bind(*args, **kwargs).args)
        dispatch = plan_dispatch(routing.expert_ids_TK, self._num_experts, routing.used_TK)
        rows_per_expert_E = dispatch.offsets_E.diff(prepend=dispatch.offsets_E.new_zeros(1))
        exchange = plan_exchange(rows_per_expert_E, self._ranks.get_group())
        rows_QD = exchange.to_experts(x_TD.index_select(0, dispatch.token_ids_P))
        y_PD = exchange.to_tokens(self._apply_own_experts(rows_QD, exchange.expert_ids_Q))
        return combine(y_PD, routing.weights_TK.to(y_PD.dtype), dispatch)

    def _unpack(self, x_TD: Tensor, *routing: Any) -> tuple[Tensor, Routing]:
        if isinstance(self._experts, GroupedExperts):
            # Cast before the exchange, which then carries half the bytes under autocast.
            return x_TD.to(compute_dtype(x_TD)), routing[0]
        if routing[0].is_floating_point():
            rule = "must take hidden states, integer expert ids and gate weights in this order to be spread over ranks"
            fix = "Choose a strategy without expert parallelism."
            raise ConfigError(self._class.__name__, rule, routing[0].dtype, fix)
        expert_ids_TK, weights_TK = routing
        return x_TD, Routing(weights_TK, expert_ids_TK, scores_TE=weights_TK)

    def _apply_own_experts(self, rows_QD: Tensor, expert_ids_Q: Tensor) -> Tensor:
        if not len(rows_QD):
            # With a row that is then dropped, this rank takes part in the backward like the others, and its experts
            # have a gradient: zero.
            rows_1D, ids_1 = functional.pad(rows_QD, (0, 0, 0, 1)), functional.pad(expert_ids_Q, (0, 1))
            return self._apply_own_experts(rows_1D, ids_1)[:0]
        ids_Q1, ones_Q1 = expert_ids_Q[:, None], rows_QD.new_ones(len(rows_QD), 1)
        local = self._own_experts()
        if isinstance(local, GroupedExperts):
            return local.forward(rows_QD, Routing(ones_Q1, ids_Q1, scores_TE=ones_Q1))
        return local.forward(rows_QD, ids_Q1, ones_Q1)

    def _own_experts(self) -> nn.Module:
        """Return the experts of this rank as a layer for one forward: the same code on fewer experts."""
        local = self._class.__new__(self._class)
        state = {name: value for name, value in vars(self._experts).items() if name != "forward"}
        parameters = {name: self._own_part(p) for name, p in self._experts.named_parameters(recurse=False)}
        vars(local).update(state, _parameters=parameters, num_experts=self._num_experts // self._ranks.size())
        return local

    def _own_part(self, parameter: nn.Parameter) -> Tensor:
        assert isinstance(parameter, DTensor)
        part, num_ranks = parameter.to_local(), self._ranks.size()
        if part.requires_grad:
            # It has seen the tokens of all ranks, so its gradient is that of the sum of their losses. The hook is not
            # on the parameter, which wrappers replace.
            part.register_hook(lambda gradient: gradient / num_ranks)
        return part
