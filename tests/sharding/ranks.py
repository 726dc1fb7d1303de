"""Lightning runs on the forked gloo ranks of ``on_ranks``, and the same in one process.

A run that compares ranks gives each the same global batches, of which it takes its share.
"""

from __future__ import annotations

import warnings
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader


def strategy(kind: str, **settings: Any) -> dict[str, Any]:
    """Arguments of a Trainer for one of: single, ddp, fsdp."""
    if kind == "single":
        return {}
    if kind == "ddp":
        chosen = DDPStrategy(process_group_backend="gloo", start_method="popen")
    else:
        sizes = {"data_parallel_size": dist.get_world_size(), "tensor_parallel_size": 1}
        chosen = ModelParallelStrategy(**(sizes | {"save_distributed_checkpoint": False} | settings))
    return {"strategy": chosen, "devices": dist.get_world_size(), "plugins": [TorchElasticEnvironment()]}


def trainer(kind: str = "single", *, distributed: dict[str, Any] | None = None, **settings: Any):
    """A quiet Trainer on the CPU."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    fixed = {"accelerator": "cpu", "enable_model_summary": False, "use_distributed_sampler": False}
    options = strategy(kind, **(distributed or {})) | quiet | fixed
    plugins = [*options.pop("plugins", []), *settings.pop("plugins", [])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lightning.Trainer(**(options | {"plugins": plugins} | settings))


def loader(global_batches: list[torch.Tensor], rank: int = 0, world_size: int = 1, accumulation: int = 1):
    """This rank's share of each batch, in ``accumulation`` micro-batches, as the data module cuts them."""
    parts = [micro.chunk(world_size)[rank] for batch in global_batches for micro in batch.chunk(accumulation)]
    return DataLoader(parts, batch_size=None)
