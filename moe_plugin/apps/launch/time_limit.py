"""Ends training after a time, as `Trainer(max_time=...)` does, but never inside an accumulation window."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from moe_plugin.apps.launch.step_boundary import is_at_step_boundary


class TimeLimit(Timer):
    """Lightning's timer, asked at step boundaries only, so the last checkpoint loses no gradient."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Look at the clock after an optimizer step."""
        if is_at_step_boundary(trainer):
            super().on_train_batch_end(trainer, *args, **kwargs)
