"""Keeps a checkpoint of the latest state that training can go on from exactly."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn


class LastCheckpoint(Checkpoint):
    """Saves after each validation and after the last step of training, over the one before.

    A checkpoint saved after the end of `fit` says that its epoch is over, and a longer run would skip the rest of
    it; `ModelCheckpoint(save_last=True)` saves only when the best one changes.

    Args:
        path: Where the checkpoint goes.
    """

    def __init__(self, path: str) -> None:
        """Takes the path; nothing is written yet."""
        self.path = path
        self._saved_step = -1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves if that was the last step."""
        if trainer.should_stop or trainer.global_step == trainer.max_steps:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves in the middle of training."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves if training ended in another way, such as by ``max_epochs``."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step == self._saved_step or trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(self.path)
