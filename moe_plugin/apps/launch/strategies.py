"""Lightning's sharding strategies from the numbers of a configuration."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import MixedPrecision

from moe_plugin.apps.models.transformer import TransformerLayer
from moe_plugin.checkpoints import VerifiedShards
from moe_plugin.errors import ConfigError
from moe_plugin.number_checks import check_integer


class FSDP2(VerifiedShards, ModelParallelStrategy):
    """FSDP2 whose folders of shards are whole or not there."""


class FSDP1(VerifiedShards, FSDPStrategy):
    """FSDP of the first generation whose folders of shards are whole or not there."""


def fsdp2(
    devices: int | Literal["auto"],
    num_nodes: int = 1,
    tensor_parallel_size: int = 1,
    save_distributed_checkpoint: bool = False,
) -> ModelParallelStrategy:
    """Return FSDP2 over all processes, or over those that a tensor-parallel dimension leaves.

    Args:
        devices: Processes per node.
        num_nodes: Nodes.
        tensor_parallel_size: Processes that share each token's computation; they must be of one node.
        save_distributed_checkpoint: Save a folder with a file per process rather than one file.

    Raises:
        ConfigError: The processes of a node don't divide into groups of ``tensor_parallel_size``.
    """
    if devices == "auto":
        devices = max(1, torch.cuda.device_count())
    check_integer("tensor_parallel_size", tensor_parallel_size)
    if devices % tensor_parallel_size:
        rule = f"must divide strategy.devices ({devices})"
        raise ConfigError("tensor_parallel_size", rule, tensor_parallel_size)
    return FSDP2(
        data_parallel_size=devices * num_nodes // tensor_parallel_size,
        tensor_parallel_size=tensor_parallel_size,
        save_distributed_checkpoint=save_distributed_checkpoint,
    )


def fsdp1(
    accelerator: str, precision: Any, state_dict_type: Literal["full", "sharded"] = "full"
) -> FSDPStrategy:
    """Return FSDP of the first generation, a unit per layer, with buffers in the precision they have.

    Args:
        accelerator: The trainer's.
        precision: The trainer's.
        state_dict_type: Save one file, or a folder with a file per process.

    Raises:
        ConfigError: There is no GPU.
    """
    if accelerator == "cpu" or not torch.cuda.is_available():
        rule = "must be a GPU for FSDP of the first generation, and there must be one"
        raise ConfigError("accelerator", rule, accelerator, "Set strategy=fsdp.")
    return FSDP1(
        auto_wrap_policy=is_unit,
        mixed_precision=mixed_precision(str(precision)),
        state_dict_type=state_dict_type,
    )


def is_unit(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """Return whether FSDP makes a module a unit, see `FSDPStrategy`: our transformer's and Hugging Face's layers."""
    is_layer = isinstance(module, TransformerLayer) or type(module).__name__.endswith("DecoderLayer")
    return recurse or is_layer


def mixed_precision(precision: str) -> MixedPrecision | None:
    """Return Lightning's choice for FSDP, except for buffers: a selection bias cast to bf16 would no longer move."""
    compute = {"bf16": torch.bfloat16, "16": torch.float16}.get(precision.partition("-")[0])
    return None if compute is None else MixedPrecision(param_dtype=compute, reduce_dtype=compute)
