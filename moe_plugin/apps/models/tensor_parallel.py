"""Attention and dense layers of our transformer, split over processes that see the same tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from moe_plugin.apps.models.attention import CausalSelfAttention
from moe_plugin.errors import ConfigError
from moe_plugin.experts import SwiGLU


def tensor_parallel_(network: nn.Module, mesh: DeviceMesh) -> None:
    """Split attention by heads, dense layers and shared experts by hidden units, in place; before sharding.

    Routers, their biases, the routed experts, norms and embeddings stay whole on every rank; all ranks compute the same
    with them.

    Args:
        network: A `Transformer`. One that is sharded already stays as it is.
        mesh: One dimension. A single rank changes nothing.

    Raises:
        ConfigError: The network has nothing that could be split, or heads or hidden units that do not divide.
    """
    if mesh.size() == 1 or isinstance(network, FSDPModule):
        return
    attentions = [module for module in network.modules() if isinstance(module, CausalSelfAttention)]
    denses = [module for module in network.modules() if isinstance(module, SwiGLU)]
    if not attentions:
        rule = "must be 1 for a network that is not ours"
        raise ConfigError("tensor_parallel_size", rule, mesh.size(), "Set strategy=fsdp.")
    for attention in attentions:
        _check("heads", attention.num_heads, mesh)
        _split_(attention, "qkv", "out", 3, mesh)
    for dense in denses:
        _check("hidden units of a dense layer", dense.down.in_features, mesh)
        _split_(dense, "gate_up", "down", 2, mesh)


def _check(what: str, count: int, mesh: DeviceMesh) -> None:
    if count % mesh.size():
        raise ConfigError("tensor_parallel_size", f"must divide the {count} {what}", mesh.size())


def _split_(module: nn.Module, entry: str, leave: str, parts: int, mesh: DeviceMesh) -> None:
    """Split the output features of the layer ``entry`` and the input features of ``leave``."""
    plan = {entry: ColwiseParallel(use_local_output=False), leave: RowwiseParallel()}
    parallelize_module(module, mesh, plan, src_data_rank=None)

    def own_part_of_each(_: nn.Module, __: Any, output: DTensor) -> Tensor:
        # Sharding the rows of the fused weight keeps the checkpoint's layout, but is no shard of each of its parts:
        # the outputs travel instead.
        whole = output.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        return whole.unflatten(-1, (parts, mesh.size(), -1))[..., mesh.get_local_rank(), :].flatten(-2)

    module.get_submodule(entry).register_forward_hook(own_part_of_each)
