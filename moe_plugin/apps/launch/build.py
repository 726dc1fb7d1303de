"""Builds the objects of a run from its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from omegaconf import DictConfig, OmegaConf
from torch.distributed._composable.checkpoint_activation import checkpoint

from moe_plugin.apps.launch.compile_layers import CompileLayers
from moe_plugin.apps.launch.processes import TIMEOUT
from moe_plugin.apps.launch.time_limit import TimeLimit
from moe_plugin.checkpoints import VerifiedCheckpointIO
from moe_plugin.sharding import find_layers

LOSS_FREE = "loss_free"
"""Key of the balancing callback below 'callbacks'."""


def build_model(config: DictConfig) -> LightningModule:
    """Return the model, on the device that is torch's default here."""
    return instantiate(config.model)


def build_model_for(config: DictConfig) -> LightningModule:
    """Return the model as the strategy wants it: on the meta device or not, its layers checkpointed or not."""
    strategy = config.strategy
    model = build_model_on_meta(config) if strategy.get("meta_init") else build_model(config)
    for layer in find_layers(model) if strategy.get("activation_checkpointing") else []:
        checkpoint(layer)
    return model


def build_model_on_meta(config: DictConfig) -> LightningModule:
    """Return the model without storage: its shapes and nothing else."""
    with torch.device("meta"):
        return build_model(config)


def build_data(config: DictConfig) -> LightningDataModule:
    """Return the data module."""
    return instantiate(config.data)


def build_callbacks(config: DictConfig) -> list[Callback]:
    """Return the callbacks; no progress bar if it is switched off."""
    callbacks = [instantiate(node) for node in (config.callbacks or {}).values() if node is not None]
    if config.strategy.get("compile") is not None:
        callbacks.append(CompileLayers(config.strategy.compile))
    shows_progress = config.trainer.enable_progress_bar
    return [callback for callback in callbacks if shows_progress or not isinstance(callback, ProgressBar)]


def to_plain(value: Any) -> Any:
    """Return a value of the configuration without omegaconf's types."""
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def build_loggers(config: DictConfig) -> list[Logger]:
    """Return the loggers, the first of them the one that metrics' x-axes come from."""
    return [instantiate(node) for node in (config.logger or {}).values() if node is not None]


def _build_strategy(config: DictConfig) -> str | Strategy:
    """Return Lightning's name of a strategy, or the object, whose ranks wait for one another for a limited time."""
    node = config.strategy.lightning
    if isinstance(node, str):
        return node
    strategy = instantiate(node)
    strategy._timeout = timedelta(seconds=config.strategy.get("timeout", TIMEOUT))
    return strategy


def build_trainer(config: DictConfig, *, callbacks: Sequence[Callback], **objects: Any) -> Trainer:
    """Return the trainer.

    Args:
        config: The run's configuration.
        callbacks: Its callbacks; one for `max_time` is added.
        **objects: Other arguments, such as ``logger``.
    """
    max_time = config.trainer.max_time
    time_limit = [] if max_time is None else [TimeLimit(to_plain(max_time))]
    val_check_interval = config.trainer.val_check_interval
    if isinstance(val_check_interval, int):  # ours counts steps, Lightning's micro-batches
        val_check_interval *= config.trainer.accumulate_grad_batches
    return instantiate(
        config.trainer,
        devices=config.strategy.devices,
        strategy=_build_strategy(config),
        val_check_interval=val_check_interval,
        max_time=None,  # `TimeLimit` does that
        callbacks=[*callbacks, *time_limit],
        plugins=[VerifiedCheckpointIO()],
        _convert_="all",
        **objects,
    )
