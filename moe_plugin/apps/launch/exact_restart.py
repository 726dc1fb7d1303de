"""Lets a resumed run continue right behind the batch that was trained on last.

Lightning forgets what was to follow that batch: a validation, the end of its epoch, and the start of the next.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.evaluation_loop import RestartStage


class ExactRestart(Callback):
    """Counts the last batch as completed, and runs a validation again that was due, begun or not."""

    def __init__(self) -> None:
        """Start with nothing to repair."""
        self._is_behind_batch = False

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Change the counters before Lightning's loops read them."""
        counters = checkpoint["loops"]["fit_loop"]
        trained, validated = (counters[f"epoch_loop.{name}batch_progress"] for name in ("", "val_loop."))
        in_batch, in_validation = _is_inside(trained), _is_inside(validated)
        self._is_behind_batch = in_batch or in_validation
        if in_batch:
            for counts in (trained["total"], trained["current"]):
                counts["completed"] = counts["processed"]
        if in_validation:
            for name, count in validated["current"].items():
                validated["total"][name] -= count
        if self._is_behind_batch:
            validated["current"] = dict.fromkeys(validated["current"], 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send the loop into the validation if there is one, and otherwise to what follows it."""
        if not self._is_behind_batch:
            return
        self._is_behind_batch = False
        loop = trainer.fit_loop.epoch_loop
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        if loop._should_check_val_fx(fetcher):
            loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
        else:
            loop._batches_that_stepped += 1
            fetcher.done = loop.batch_progress.is_last_batch


def _is_inside(progress: dict[str, Any]) -> bool:
    """Return whether a checkpoint was saved in the hook at the end of a batch."""
    return progress["current"]["completed"] < progress["current"]["processed"]
