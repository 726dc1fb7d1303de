"""Warn when training goes on and the optimizer that trains the routers never steps."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from moe_plugin.callbacks.step_clock import StepClock
from moe_plugin.errors import BalanceWarning

PATIENCE = 16
"""Training batches without a step that are not yet a reason to warn."""


class IdleAlarm:
    """Warns once per training of too many batches without a step."""

    def __init__(self, clock: StepClock) -> None:
        """Take what counts the batches."""
        self._clock = clock
        self._is_told = False

    def start_(self) -> None:
        """Begin with a new training."""
        self._is_told = False

    def batch_ends(self, trainer: Trainer) -> None:
        """Warn if accumulation does not explain the batches without a step."""
        if self._clock.idle_batches > max(PATIENCE, trainer.accumulate_grad_batches):
            self._tell(f"in {self._clock.idle_batches} training batches")

    def training_ends(self, pl_module: LightningModule) -> None:
        """Warn if manual optimization, perhaps of a few batches only, made no step at all."""
        is_manual = not pl_module.automatic_optimization
        if is_manual and self._clock.idle_batches and not self._clock.has_stepped:
            self._tell("in the whole training")

    def _tell(self, when: str) -> None:
        if not self._is_told:
            rank_zero_warn(
                f"No bias was updated {when}: the optimizer that trains the routers ({self._clock.followed}) did not "
                "step. With manual optimization, return it from configure_optimizers and call step() of "
                "self.optimizers() in training_step. If it steps more rarely on purpose, ignore this.",
                category=BalanceWarning,
            )
        self._is_told = True
