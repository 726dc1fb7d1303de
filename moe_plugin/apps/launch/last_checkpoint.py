"""Keeps a checkpoint of the latest state from which training can continue exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from moe_plugin.apps.launch.step_boundary import is_at_step_boundary

LAST = "last"


class LastCheckpoint(Checkpoint):
    """Saves after each validation, after the last step and when a signal stops training, over the one before.

    A checkpoint saved after the end of `fit` says that its epoch is over, and a longer run would skip the rest of
    it; `ModelCheckpoint(save_last=True)` saves only when the best one changes.

    Attributes:
        path: Where the checkpoint goes.
        saved_step: The optimizer step saved last; -1 before any.
    """

    def __init__(self, path: str) -> None:
        """Take the path; nothing is written yet."""
        self.path = path
        self.saved_step = -1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if that was the last step."""
        if trainer.should_stop or trainer.received_sigterm or trainer.global_step == trainer.max_steps:
            self._save(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Save if a signal stops training in the middle of a validation."""
        if trainer.received_sigterm:
            self._save_in_training(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save in the middle of training."""
        self._save_in_training(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if training ended in another way, such as by ``max_epochs``."""
        self._save(trainer)

    def _save_in_training(self, trainer: Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step == self.saved_step or trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        if is_at_step_boundary(trainer):
            self.saved_step = trainer.global_step
            trainer.save_checkpoint(self.path)


def find_checkpoint(ckpt_path: str | None, run_folder: Path) -> str | None:
    """Return the checkpoint to continue from.

    Args:
        ckpt_path: A path; ``"last"`` for the run folder's own last checkpoint, None if there is none yet, so a job
            that is queued again continues with the same command.
        run_folder: The run's folder.
    """
    if ckpt_path != LAST:
        return ckpt_path
    last = run_folder / "checkpoints" / "last.ckpt"
    return str(last) if last.exists() else None
