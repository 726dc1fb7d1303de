"""Keeps a checkpoint of the latest state from which training can continue exactly."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from moe_plugin.apps.launch.step_boundary import is_at_step_boundary
from moe_plugin.checkpoints.manifest import verify
from moe_plugin.checkpoints.replace import previous_of
from moe_plugin.checkpoints.sharded import shapes_in
from moe_plugin.checkpoints.temporary import remove_leftovers
from moe_plugin.checkpoints.verified_io import is_remote
from moe_plugin.errors import CheckpointError

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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove what an earlier process was saving when it was killed."""
        if stage == TrainerFn.FITTING and trainer.is_global_zero:
            remove_leftovers(Path(self.path).parent)

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


def find_checkpoint(ckpt_path: str | None, run_folder: Path, *, trusted: bool = False) -> str | None:
    """Return the checkpoint to continue from, after verifying it.

    Args:
        ckpt_path: A path; ``"last"`` for the run folder's own last checkpoint that is good, None if there is none yet,
            so a job that is queued again continues with the same command.
        run_folder: The run's folder.
        trusted: The checkpoint is the user's own: it may be at a URL and hold any object.

    Raises:
        CheckpointError: A checkpoint is damaged, and there is no other; it names the file.
    """
    if ckpt_path is None or is_remote(ckpt_path):
        return ckpt_path
    if ckpt_path != LAST:
        _verify(Path(ckpt_path), trusted)
        return ckpt_path
    last = run_folder / "checkpoints" / "last.ckpt"
    faults: list[str] = []
    for path in _newest_first(last):
        if fault := _fault_of(path, trusted):
            faults.append(fault)
            continue
        if path != last:
            reason = faults[0] if faults else f"{str(last)!r} is missing."
            print(f"{reason} Continuing from {str(path)!r}.", file=sys.stderr, flush=True)
        return str(path)
    if faults:
        raise CheckpointError(
            f"{faults[0]} No other checkpoint of the run is good; start it in a new folder."
        )
    return None


def newest_checkpoint(run_folder: Path) -> Path | None:
    """Return the last checkpoint that a run has saved, if any; it is verified when a run continues from it."""
    last = run_folder / "checkpoints" / "last.ckpt"
    return next((path for path in (last, previous_of(last)) if path.exists()), None)


def _newest_first(last: Path) -> list[Path]:
    """Return the last checkpoint, the one that it replaced, and then the others; nothing if neither is there."""
    latest = [path for path in (last, previous_of(last)) if path.exists()]
    patterns = ("*.ckpt", previous_of(Path("*.ckpt")).name)
    others = {path for pattern in patterns for path in last.parent.glob(pattern)} - set(latest)
    return latest and [*latest, *sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)]


def _fault_of(path: Path, trusted: bool) -> str:
    """Return what is wrong with a checkpoint."""
    try:
        _verify(path, trusted)
    except CheckpointError as error:
        return str(error)
    return ""


def _verify(path: Path, trusted: bool) -> None:
    """Verify a checkpoint, as far as that can be done."""
    if not verify(path):
        shapes_in(path, trusted=trusted)
        note = f"{str(path)!r} was saved without a SHA-256, so only its form is verified."
        print(note, file=sys.stderr, flush=True)
