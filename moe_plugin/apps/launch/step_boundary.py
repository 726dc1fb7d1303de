"""Where a run can be cut in two: after an optimizer step, never inside an accumulation window."""

from __future__ import annotations

from lightning.pytorch import Trainer


def is_at_step_boundary(trainer: Trainer) -> bool:
    """Return whether the micro-batch that was last trained on ended in an optimizer step.

    A checkpoint saved elsewhere loses the gradients gathered so far.
    """
    return not trainer.fit_loop.epoch_loop._should_accumulate()
