"""Notes how far training is, for whoever waits for it: the command, and the deadline after a signal."""

from __future__ import annotations

import math
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from moe_plugin.apps.launch.rank_state import own_state

PATIENCE = 15.0
"""Seconds; steps that have taken longer are given twice the time of the slowest."""


class Heartbeat(Callback):
    """Counts the parts of each step in shared memory: a few microseconds for each, and no message."""

    def __init__(self) -> None:
        """Begin at nothing."""
        self.state = own_state()
        self._last = time.monotonic()

    def move(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Note that the main thread has finished another part of its work.

        Args:
            trainer: The run's.
            *args: Other arguments of Lightning's hooks.
            **kwargs: The same.
        """
        now, before = time.monotonic(), self._last
        self._last = now
        if self.state.moves:  # what comes before the first step is no measure for others
            self.state.slowest = max(self.state.slowest, now - before)
        self.state.is_saving = False
        self.state.step = trainer.global_step
        self.state.moves += 1

    on_train_start = on_train_batch_start = on_before_backward = on_after_backward = on_train_batch_end = move
    on_validation_start = on_validation_batch_start = on_validation_batch_end = on_validation_end = move
    on_fit_end = move

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note that a checkpoint is being saved, until the next move."""
        self.state.is_saving = True


def patience() -> float:
    """Return for how many seconds without a move a step may still be under way when a signal has come."""
    state = own_state()
    return math.inf if state.is_saving else max(PATIENCE, 2 * state.slowest)
