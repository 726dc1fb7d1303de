"""Where things are logged, and at which step."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger


def first_rank_loggers(trainer: Trainer) -> list[Logger]:
    """Return the trainer's loggers on the first rank, else []."""
    return trainer.loggers if trainer.is_global_zero else []


def tensorboard_writers(loggers: Iterable[Logger]) -> list[Any]:
    """Return the TensorBoard writers among the loggers; they also take text, tensors and layouts."""
    writers = [getattr(logger, "experiment", None) for logger in loggers]
    return [writer for writer in writers if hasattr(writer, "add_custom_scalars")]


def log_folder(loggers: Iterable[Logger]) -> Path | None:
    """Return the first folder on this machine that a logger writes to."""
    for logger in loggers:
        folder = getattr(logger, "log_dir", None) or logger.save_dir
        if folder is not None and Path(folder).is_dir():
            return Path(folder)
    return None


def logged_step(trainer: Trainer) -> int:
    """Return the step under which Lightning logs its own scalars."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped
