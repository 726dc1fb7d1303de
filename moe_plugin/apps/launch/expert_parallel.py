"""Expert parallelism from the numbers of a configuration."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from omegaconf import DictConfig

from moe_plugin.apps.launch.build import build_model_on_meta
from moe_plugin.apps.launch.processes import number_of_processes
from moe_plugin.checkpoints import VerifiedShards
from moe_plugin.errors import ConfigError
from moe_plugin.experts.parallel import find_expert_layers
from moe_plugin.number_checks import check_integer


class ExpertParallelStrategy(VerifiedShards, ModelParallelStrategy):
    """FSDP2 over all processes, which also knows among how many of them each layer's experts are divided.

    Attributes:
        expert_parallel_size: What a LightningModule hands to `shard_` in its ``configure_model``.
    """

    def __init__(
        self,
        devices: int | Literal["auto"],
        num_nodes: int = 1,
        expert_parallel_size: int | Literal["auto"] = "auto",
        save_distributed_checkpoint: bool = False,
    ) -> None:
        """Check the numbers.

        Args:
            devices: Processes per node.
            num_nodes: Nodes.
            expert_parallel_size: Processes that hold all experts of a layer together; "auto" takes those of a node.
            save_distributed_checkpoint: Save a folder with a file per process rather than one file.

        Raises:
            ConfigError: The processes don't divide into groups of ``expert_parallel_size``.
        """
        if devices == "auto":
            devices = max(1, torch.cuda.device_count())
        processes = devices * num_nodes
        size = devices if expert_parallel_size == "auto" else expert_parallel_size
        check_integer("expert_parallel_size", size)
        if processes % size:
            rule = f"must divide the number of processes ({processes})"
            raise ConfigError("expert_parallel_size", rule, size)
        super().__init__(processes, 1, save_distributed_checkpoint)
        self.expert_parallel_size = size


def check_experts(config: DictConfig) -> None:
    """Check that the experts of the model can be divided as the strategy says."""
    size = expert_parallel_size(config)
    if size > 1:
        find_expert_layers(build_model_on_meta(config), size)


def expert_parallel_size(config: DictConfig) -> int:
    """Return among how many processes the strategy divides each layer's experts."""
    size = config.strategy.get("expert_parallel_size", 1)
    return number_of_processes(config) if size == "auto" else size
