"""Expert parallelism: each rank holds some of the experts, and tokens travel to theirs and back.

Works on every module of stacked experts, ours or those of transformers, that maps hidden states, expert ids and gate
weights to hidden states.
"""

from __future__ import annotations

import inspect

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from moe_plugin.errors import ConfigError
from moe_plugin.experts.grouped import GroupedExperts
from moe_plugin.experts.parallel_forward import ExpertParallelForward
from moe_plugin.experts.stacks import has_experts_in_weights
from moe_plugin.number_checks import check_positive_integers


def expert_mesh(data_parallel: DeviceMesh, size: int) -> DeviceMesh:
    """Return the mesh for `parallelize_experts_`: groups of `size` neighbouring ranks that share the experts.

    Args:
        data_parallel: All ranks that see different tokens, one dimension.
        size: Ranks that hold all experts together.

    Returns:
        `data_parallel` itself if it has this size, else a mesh of two dimensions: ranks with the same experts, and
        ranks with different ones.

    Raises:
        ConfigError: The size does not divide the number of ranks.
    """
    ranks = data_parallel.size()
    check_positive_integers(expert_parallel_size=size)
    if ranks % size:
        raise ConfigError("expert_parallel_size", f"must divide the data-parallel ranks ({ranks})", size)
    if size == ranks:
        return data_parallel
    mesh = data_parallel._unflatten(0, (ranks // size, size), ("expert_data_parallel", "expert_parallel"))
    # DTensor looks for the flat mesh, to gather a parameter or sum a norm in one collective instead of two.
    mesh._flatten()
    return mesh


def parallelize_experts_(module: nn.Module, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Spread the experts of every expert layer over the ranks; call it before `fully_shard`.

    Each expert parameter becomes a `DTensor` sharded over its experts, and the layer's forward sends each token to the
    ranks of its experts and back. Routers stay as they are. Gradients of the experts are those of the loss averaged
    over all ranks, as with DDP and FSDP. All ranks must run the layers in step, also without tokens. Layers that are
    spread already stay as they are.

    Args:
        module: A model or a part of it, on any device including meta, with the same weights on all ranks.
        mesh: From `expert_mesh`. FSDP2 shards the experts over the first of two dimensions.

    Returns:
        The expert parameters, which other wrappers must leave alone: `fully_shard(..., ignored_params=...)`.

    Raises:
        ConfigError: There are no such experts, or their number is not a multiple of the ranks.
    """
    ranks = mesh if mesh.ndim == 1 else mesh["expert_parallel"]
    layers = find_expert_layers(module, ranks.size())
    for experts in layers:
        if not isinstance(experts.forward, ExpertParallelForward):
            _parallelize_(experts, ranks)
            if mesh.ndim == 2:
                _fully_shard_(experts, mesh["expert_data_parallel"])
    return {parameter for experts in layers for parameter in experts.parameters()}


def find_expert_layers(module: nn.Module, expert_parallel_size: int) -> list[nn.Module]:
    """Find the layers of experts that `parallelize_experts_` spreads.

    Args:
        module: A model or a part of it, on any device including meta.
        expert_parallel_size: Ranks that hold all experts together.

    Raises:
        ConfigError: There are none, or their number of experts is not a multiple of the size.
    """
    layers = {name: layer for name, layer in module.named_modules() if _is_expert_layer(layer)}
    if not layers:
        rule = "must have experts stacked in 3-D parameters that can be spread over ranks"
        raise ConfigError(type(module).__name__, rule, fix="Choose a strategy without expert parallelism.")
    for name, layer in layers.items():
        num_experts: int = layer.num_experts  # pyright: ignore[reportAssignmentType]
        if num_experts % expert_parallel_size:
            rule = f"must divide the experts of '{name}' ({num_experts})"
            raise ConfigError("expert_parallel_size", rule, expert_parallel_size)
    return list(layers.values())


def _is_expert_layer(module: nn.Module) -> bool:
    """Return whether all parameters are stacked by expert, and the forward takes what `_unpack` does."""
    if isinstance(module, GroupedExperts):
        return True
    num_experts = getattr(module, "num_experts", None)
    if num_experts is None or not has_experts_in_weights(module, num_experts):
        return False
    if any(parameter.shape[0] != num_experts for parameter in module.parameters()):
        return False
    return len(inspect.signature(module.forward).parameters) == 3


def _parallelize_(experts: nn.Module, ranks: DeviceMesh) -> None:
    experts.forward = ExpertParallelForward(experts, ranks)  # pyright: ignore[reportAttributeAccessIssue]
    for name, parameter in list(experts.named_parameters(recurse=False)):
        # A copy: a view would keep the storage of the whole alive.
        own = parameter.detach().chunk(ranks.size())[ranks.get_local_rank()].clone()
        part = DTensor.from_local(own, ranks, [Shard(0)], run_check=False)
        experts.register_parameter(name, nn.Parameter(part, requires_grad=parameter.requires_grad))


def _fully_shard_(experts: nn.Module, mesh: DeviceMesh) -> None:
    def place(parameter: nn.Parameter) -> Shard:
        # Gathering takes two collectives if a dimension is sharded over both meshes: so the width, if it divides.
        return Shard(1 if parameter.shape[1] % mesh.size() == 0 else 0)

    fully_shard(experts, mesh=mesh, shard_placement_fn=place)
