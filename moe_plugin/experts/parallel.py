"""Expert parallelism: each rank holds some of the experts, and tokens travel to theirs and back.

Works on every module of stacked experts that maps hidden states, expert ids and gate weights to hidden states: ours,
and those of transformers. The module's own forward runs on each rank, on fewer experts and on the rows received.

Shape legend: T tokens, D model width, K experts selected per token, E experts, P = T * K token-expert pairs, Q rows
received.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional

from moe_plugin.errors import ConfigError
from moe_plugin.experts.all_to_all import plan_exchange
from moe_plugin.experts.dispatch import combine, plan_dispatch
from moe_plugin.experts.grouped import GroupedExperts, compute_dtype
from moe_plugin.types import Routing


def expert_mesh(data_parallel: DeviceMesh, size: int) -> DeviceMesh:
    """The mesh for `parallelize_experts_`: groups of `size` neighbouring ranks that share the experts among them.

    Args:
        data_parallel: All ranks that see different tokens, one dimension.
        size: Ranks that hold all experts together.

    Returns:
        `data_parallel` itself where it has this size, else a mesh of two dimensions: ranks with the same experts, and
        ranks with different ones.

    Raises:
        ConfigError: The size does not divide the number of ranks.
    """
    ranks = data_parallel.size()
    if size < 1 or ranks % size:
        raise ConfigError(
            f"'expert_parallel_size' must divide the data-parallel ranks ({ranks}), got {size}."
        )
    if size == ranks:
        return data_parallel
    return data_parallel._unflatten(0, (ranks // size, size), ("expert_data_parallel", "expert_parallel"))


def parallelize_experts_(module: nn.Module, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Spread the experts of every expert layer over the ranks; call it before `fully_shard`.

    Each expert parameter becomes a `DTensor` sharded over its experts, and the layer's forward sends each token to the
    ranks of its experts and back. Routers are left alone. Gradients of the experts are those of the loss averaged
    over all ranks, as DDP and FSDP have it. All ranks must run the layers in step, also without tokens. Layers that
    are spread already stay as they are.

    Args:
        module: A model or a part of it, on any device including meta, with the same weights on all ranks.
        mesh: From `expert_mesh`. Over the first of two dimensions the experts are sharded by FSDP2.

    Returns:
        The expert parameters, which no other wrapper may touch: `fully_shard(..., ignored_params=...)`.

    Raises:
        ConfigError: There are no such experts, or their number is not a multiple of the ranks.
    """
    ranks = mesh if mesh.ndim == 1 else mesh["expert_parallel"]
    layers = {name: layer for name, layer in module.named_modules() if _is_expert_layer(layer)}
    if not layers:
        raise ConfigError(
            f"'{type(module).__name__}' must have experts stacked in 3-D parameters, got none that can be spread "
            "over ranks. Choose a strategy without expert parallelism."
        )
    for name, experts in layers.items():
        _check_divides(name, experts, ranks.size())
    for experts in layers.values():
        if not isinstance(experts.forward, ExpertParallelForward):
            _parallelize_(experts, ranks)
            if mesh.ndim == 2:
                _fully_shard_(experts, mesh["expert_data_parallel"])
    return {parameter for experts in layers.values() for parameter in experts.parameters()}


class ExpertParallelForward:
    """Takes the place of the forward of a layer of experts of which this rank holds some."""

    def __init__(self, experts: nn.Module, ranks: DeviceMesh) -> None:
        """Remembers the layer as it is, before any wrapper.

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
        """Applies the selected experts to each token: (T, D), as the layer's own forward does."""
        x_TD, expert_ids_TK, weights_TK = self._unpack(*self._signature.bind(*args, **kwargs).args)
        dispatch = plan_dispatch(expert_ids_TK, self._num_experts)
        rows_per_expert_E = dispatch.offsets_E.diff(prepend=dispatch.offsets_E.new_zeros(1))
        exchange = plan_exchange(rows_per_expert_E, self._ranks.get_group())
        rows_QD = exchange.to_experts(x_TD.index_select(0, dispatch.token_ids_P))
        y_PD = exchange.to_tokens(self._apply_own_experts(rows_QD, exchange.expert_ids_Q))
        return combine(y_PD, weights_TK.to(y_PD.dtype), dispatch)

    def _unpack(self, x_TD: Tensor, *routing: Any) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(self._experts, GroupedExperts):
            # Cast before the journey, which then carries half the bytes under autocast.
            return x_TD.to(compute_dtype(x_TD)), routing[0].expert_ids_TK, routing[0].weights_TK
        if routing[0].is_floating_point():
            raise ConfigError(
                f"'{self._class.__name__}' must take hidden states, expert ids and gate weights in this order to be "
                f"spread over ranks, got {routing[0].dtype} for the ids. Choose a strategy without expert parallelism."
            )
        return x_TD, *routing

    def _apply_own_experts(self, rows_QD: Tensor, expert_ids_Q: Tensor) -> Tensor:
        if not len(rows_QD):
            # With a row to work on, which is then dropped, this rank takes part in the backward like the others, and
            # its experts have a gradient: zero.
            rows_1D, ids_1 = functional.pad(rows_QD, (0, 0, 0, 1)), functional.pad(expert_ids_Q, (0, 1))
            return self._apply_own_experts(rows_1D, ids_1)[:0]
        ids_Q1, ones_Q1 = expert_ids_Q[:, None], rows_QD.new_ones(len(rows_QD), 1)
        local = self._own_experts()
        if isinstance(local, GroupedExperts):
            return local.forward(rows_QD, Routing(ones_Q1, ids_Q1, scores_TE=ones_Q1))
        return local.forward(rows_QD, ids_Q1, ones_Q1)

    def _own_experts(self) -> nn.Module:
        """The experts of this rank as a layer of their own, for one forward: the same code on fewer experts."""
        local = self._class.__new__(self._class)
        state = {name: value for name, value in vars(self._experts).items() if name != "forward"}
        parameters = {name: self._own_part(p) for name, p in self._experts.named_parameters(recurse=False)}
        vars(local).update(state, _parameters=parameters, num_experts=self._num_experts // self._ranks.size())
        return local

    def _own_part(self, parameter: nn.Parameter) -> Tensor:
        assert isinstance(parameter, DTensor)
        part, num_ranks = parameter.to_local(), self._ranks.size()
        if part.requires_grad:
            # The tokens of all ranks have gone into it, so its gradient is that of the sum of their losses. Here, and
            # not on the parameter, which wrappers replace.
            part.register_hook(lambda gradient: gradient / num_ranks)
        return part


def _is_expert_layer(module: nn.Module) -> bool:
    """Whether all parameters are stacked by expert, and the forward takes what `_unpack` does."""
    if isinstance(module, GroupedExperts):
        return True
    num_experts, own = getattr(module, "num_experts", None), list(module.parameters(recurse=False))
    is_stacked = any(parameter.ndim == 3 for parameter in own)
    if not is_stacked or any(parameter.shape[0] != num_experts for parameter in module.parameters()):
        return False
    return len(inspect.signature(module.forward).parameters) == 3


def _check_divides(name: str, experts: nn.Module, num_ranks: int) -> None:
    num_experts: int = experts.num_experts  # pyright: ignore[reportAssignmentType]
    if num_experts % num_ranks:
        raise ConfigError(
            f"'expert_parallel_size' must divide the experts of '{name}' ({num_experts}), got {num_ranks}."
        )


def _parallelize_(experts: nn.Module, ranks: DeviceMesh) -> None:
    experts.forward = ExpertParallelForward(experts, ranks)  # pyright: ignore[reportAttributeAccessIssue]
    for name, parameter in list(experts.named_parameters(recurse=False)):
        # A copy, for a part would keep the storage of the whole alive.
        own = parameter.detach().chunk(ranks.size())[ranks.get_local_rank()].clone()
        part = DTensor.from_local(own, ranks, [Shard(0)], run_check=False)
        experts.register_parameter(name, nn.Parameter(part, requires_grad=parameter.requires_grad))


def _fully_shard_(experts: nn.Module, mesh: DeviceMesh) -> None:
    def place(parameter: nn.Parameter) -> Shard:
        # Gathering takes two collectives where a dimension is sharded over both meshes: so the width, if it divides.
        return Shard(1 if parameter.shape[1] % mesh.size() == 0 else 0)

    fully_shard(experts, mesh=mesh, shard_placement_fn=place)
