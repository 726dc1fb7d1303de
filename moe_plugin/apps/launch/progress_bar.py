"""The progress line of a run."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class ProgressBar(TQDMProgressBar):
    """Shows the losses of training whenever it is refreshed.

    Lightning reads what is logged with ``prog_bar=True`` from the device in every step, which then waits for it.
    """

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return Lightning's numbers, and what is logged as ``train/*``."""
        shown = super().get_metrics(trainer, pl_module)
        logged = trainer.logged_metrics.items()
        return shown | {name: float(value) for name, value in logged if name.startswith("train/")}
