"""Parameters for a model that was created on the meta device, in their place and no larger than needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from moe_plugin.errors import ConfigError


@torch.no_grad()
def materialize_(model: nn.Module, device: torch.device) -> None:
    """Give each tensor of ``model`` that is on the meta device storage and its initial value, in place.

    One module after another draws its parameters in full and keeps its shard. The values follow from
    `torch.initial_seed` and the module's name alone: they are the same bit for bit with any strategy and any number of
    processes. Without the meta device the same seed gives other values, as modules draw from one generator.

    Modules are initialised by their ``reset_parameters``, and then by the ``_init_weights`` of the transformers model
    that they are part of, if any.

    Args:
        model: The model; shard it before, if at all.
        device: Where the tensors go.

    Raises:
        ConfigError: A module leaves a tensor without a value.
    """
    hosts: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        hosts[name] = (
            module if hasattr(module, "_init_weights") else hosts.get(name.rpartition(".")[0], module)
        )
        if any(tensor.is_meta for tensor in _own_tensors(module)):
            module.to_empty(device=device, recurse=False)
            with _drawn_from(f"{torch.initial_seed()}/{name}", device), _in_full(module):
                _draw_(module, name, hosts[name])


def _draw_(module: nn.Module, name: str, host: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.fill_(torch.nan)
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()  # pyright: ignore[reportCallIssue]
    if hasattr(host, "_init_weights"):
        host._init_weights(module)  # pyright: ignore[reportCallIssue]
    for tensor_name, parameter in module.named_parameters(recurse=False):
        if parameter.isnan().any():
            rule = f"needs a method {type(module).__name__}.reset_parameters() that draws {tensor_name!r} of {name!r}"
            raise ConfigError("meta_init", rule, fix="Write it, or create the model with meta_init=false.")


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


@contextmanager
def _drawn_from(key: str, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
        yield


@contextmanager
def _in_full(module: nn.Module) -> Iterator[None]:
    """Make the sharded parameters of a module whole tensors within the block; it then keeps its shards."""
    shards = {name: p for name, p in module.named_parameters(recurse=False) if isinstance(p, DTensor)}
    for name, shard in shards.items():
        whole = torch.empty(shard.shape, dtype=shard.dtype, device=shard.device)
        module.register_parameter(name, nn.Parameter(whole, requires_grad=shard.requires_grad))
    yield
    for name, shard in shards.items():
        whole = module.get_parameter(name).data
        kept = distribute_tensor(whole, shard.device_mesh, shard.placements, src_data_rank=None)
        shard.to_local().copy_(kept.to_local())
        module.register_parameter(name, shard)
