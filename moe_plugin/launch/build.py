"""Builds the objects of a run from its configuration."""

from __future__ import annotations

from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig


def build_model(config: DictConfig) -> LightningModule:
    """Returns the model, on the device that is torch's default here."""
    return instantiate(config.model)


def build_model_on_meta(config: DictConfig) -> LightningModule:
    """Returns the model without storage: its shapes and nothing else."""
    with torch.device("meta"):
        return build_model(config)


def build_data(config: DictConfig) -> LightningDataModule:
    """Returns the data module."""
    return instantiate(config.data)


def build_callbacks(config: DictConfig) -> list[Callback]:
    """Returns the balancing callback, if there is one, and then the others; no progress bar where none is wanted."""
    nodes = [config.balancing.callback, *(config.callbacks or {}).values()]
    callbacks = [instantiate(node) for node in nodes if node is not None]
    shows_progress = config.trainer.enable_progress_bar
    return [callback for callback in callbacks if shows_progress or not isinstance(callback, ProgressBar)]


def build_loggers(config: DictConfig) -> list[Logger]:
    """Returns the loggers, the first of them the one that metrics' x-axes come from."""
    return [instantiate(node) for node in (config.logger or {}).values() if node is not None]


def build_trainer(config: DictConfig, **objects: Any) -> Trainer:
    """Returns the trainer.

    Args:
        config: The run's configuration.
        **objects: ``callbacks``, ``logger``: what is no plain value of the configuration.
    """
    strategy = config.strategy.lightning
    return instantiate(
        config.trainer,
        devices=config.strategy.devices,
        strategy=strategy if isinstance(strategy, str) else instantiate(strategy),
        _convert_="all",
        **objects,
    )
