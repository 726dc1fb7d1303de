"""One training job in one process: fit, validate on the whole validation split, write down the results."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor
from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text
from torch import nn

from moe_plugin.apps.launch.build import (
    build_callbacks,
    build_data,
    build_loggers,
    build_model,
    build_model_for,
    build_model_on_meta,
    build_trainer,
)
from moe_plugin.apps.launch.disk_errors import DiskErrors
from moe_plugin.apps.launch.exact_restart import ExactRestart
from moe_plugin.apps.launch.heartbeat import Heartbeat
from moe_plugin.apps.launch.hparams import log_hyperparameters
from moe_plugin.apps.launch.override_optimizer import OverrideOptimizer
from moe_plugin.apps.launch.quiet_logs import quiet
from moe_plugin.apps.launch.random_state import RandomState
from moe_plugin.apps.launch.resumed_settings import StoredSettings
from moe_plugin.apps.launch.signals import StopSignals
from moe_plugin.apps.launch.stop_at_signal import StopAtSignal, told_when_stopped
from moe_plugin.apps.launch.training_speed import Throughput
from moe_plugin.apps.models.size import fixed_experts_per_token, measure
from moe_plugin.apps.received.printable import printable
from moe_plugin.apps.report.environment import describe_environment, write_environment
from moe_plugin.apps.report.json_file import write_json
from moe_plugin.apps.report.run_table import run_report, tensorboard_command
from moe_plugin.apps.report.summary import RunSummary, write_summary
from moe_plugin.callbacks.load_monitor import LoadMonitor

_OF_LAUNCHERS = ("LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which Lightning tells a process that a launcher has started it."""


def train(config: DictConfig) -> None:
    """Train and validate; the first process leaves checkpoints, logs and ``summary.json`` in the run's folder.

    Args:
        config: A run's resolved configuration; ``paths.output`` is its folder.

    Raises:
        RunError: The disk failed.
    """
    folder, clock = Path(config.paths.output), Throughput()
    with StopSignals(folder) as signals, quiet(), _ended_process_group(), DiskErrors(folder):
        seed_everything(config.seed, workers=True, verbose=False)
        data, model = build_data(config), build_model_for(config)
        callbacks = [*build_callbacks(config), clock, RandomState(), ExactRestart(), Heartbeat()]
        callbacks += [StopAtSignal(signals), StoredSettings(config)]
        callbacks += [OverrideOptimizer()] if config.override_optimizer else []
        trainer = build_trainer(config, callbacks=callbacks, logger=build_loggers(config))
        if trainer.is_global_zero:
            write_environment(describe_environment(trainer.world_size, trainer.strategy.root_device), folder)
        with told_when_stopped(signals, trainer, folder):
            metrics = _fit_and_validate(trainer, model, data, config)
        if trainer.is_global_zero and metrics:
            _write_manifest(data, folder)
            summary = _summarise(config, metrics, clock)
            write_summary(summary, folder)
            _print_report(summary, callbacks, folder)


@contextmanager
def _ended_process_group() -> Iterator[None]:
    """End what Lightning leaves, a process group and variables: a sweep's next job may want others, or none.

    A group whose other processes may still wait in a collective is left to the end of this process.
    """
    absent = [name for name in _OF_LAUNCHERS if name not in os.environ]
    try:
        yield
    except BaseException:
        if dist.is_initialized() and dist.get_world_size() == 1:
            dist.destroy_process_group()
        raise
    finally:
        for name in absent:
            os.environ.pop(name, None)
    if dist.is_initialized():
        dist.destroy_process_group()


def _fit_and_validate(
    trainer: Trainer, model: LightningModule, data: LightningDataModule, config: DictConfig
) -> Mapping[str, float]:
    """Return the metrics of the whole validation split after training; none after a dry run."""
    log_hyperparameters(trainer.loggers, Path(config.paths.output), config.seed)
    trusted: dict[str, Any] = {"weights_only": False} if config.trust else {}
    trainer.fit(model, data, ckpt_path=config.ckpt_path, **trusted)
    if config.trainer.fast_dev_run:
        return {}
    # The whole split, however much of it the validations during training look at.
    trainer.limit_val_batches = 1.0
    (metrics,) = trainer.validate(model, data, verbose=False)
    return metrics


def validate_checkpoint(config: DictConfig) -> tuple[dict[str, Any], Trainer]:
    """Return the validation measures of the checkpoint ``ckpt_path``, over the whole split, and what measured them."""
    with quiet():
        seed_everything(config.seed, workers=True, verbose=False)
        fit_only = (Checkpoint, LearningRateMonitor)
        callbacks = [callback for callback in build_callbacks(config) if not isinstance(callback, fit_only)]
        trainer = build_trainer(config, callbacks=callbacks, logger=False, enable_checkpointing=False)
        trainer.limit_val_batches = 1.0
        model, data = build_model(config), build_data(config)
        (metrics,) = trainer.validate(
            model, data, ckpt_path=config.ckpt_path, verbose=False, weights_only=not config.trust
        )
    return _validation_measures(metrics, model), trainer


def _summarise(config: DictConfig, metrics: Mapping[str, float], clock: Throughput) -> RunSummary:
    """Return the run in numbers."""
    model = build_model_on_meta(config)
    size, measures = measure(model), _validation_measures(metrics, model)
    used = measures["mean_experts_per_token"]
    return RunSummary(
        **measures,
        tokens_per_second=clock.tokens_per_second,
        seconds=clock.seconds,
        seed=config.seed,
        parameters_total=size.total_parameters,
        parameters_active=size.active_parameters,
        target_experts_per_token=size.experts_per_token,
        active_flops_per_token=None if used is None else size.active_flops(used),
    )


def _validation_measures(metrics: Mapping[str, float], model: nn.Module) -> dict[str, Any]:
    """Return what a validation measured, under the names of ``summary.json``."""
    loss, dead = metrics.get("val/loss"), metrics.get("val/dead_experts")
    return {
        "val_loss": loss,
        "perplexity": None if loss is None else _perplexity(loss),
        "max_violation_batch": metrics.get("val/max_violation_batch"),
        "max_violation_global": metrics.get("val/max_violation_global"),
        "dead_experts": None if dead is None else round(dead),
        "mean_experts_per_token": metrics.get("val/experts_per_token", fixed_experts_per_token(model)),
    }


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _write_manifest(data: object, folder: Path) -> None:
    """Write down which files were read, if the data module knows."""
    manifest = getattr(data, "manifest", None)
    if manifest is not None:
        write_json(folder / "data_manifest.json", manifest)


def _print_report(summary: RunSummary, callbacks: list[Callback], folder: Path) -> None:
    """Print the run's results, where its files are, and the command that shows its logs."""
    console, events = Console(), folder / "tensorboard"
    for callback in callbacks:
        if isinstance(callback, LoadMonitor):
            console.print(run_report(summary, callback))
    files = ", ".join(sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")))
    console.print()
    console.print(Text(printable(f"Run: {folder}  ({files})")), soft_wrap=True)
    if events.exists():
        command = (printable(tensorboard_command(events)), "bold cyan")
        console.print(Text.assemble("To look: ", command), soft_wrap=True)
