"""Set the biases once more at the end of training, with fixed weights, on the last training batches.

A bias that follows the load step by step lags behind a router that moves, and carries the noise of small batches.
After training the biases that balance the last batches can be solved for instead.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from moe_plugin.attach.balanced_model import BalancedModel
from moe_plugin.errors import ConfigError
from moe_plugin.number_checks import check_positive_integers


class Calibration:
    """Keeps the last training batches, and solves for the biases in the last step, before its checkpoint is written.

    The batches go through ``training_step`` again, without gradients and in evaluation mode, ``passes + 1`` times.

    Attributes:
        num_batches: The last batches of each rank, to balance on. They stay in memory until the end.
        passes: How often all biases are solved for.
    """

    def __init__(self, num_batches: int = 64, passes: int = 2) -> None:
        """Check the numbers.

        Raises:
            ConfigError: If one of them is not a positive integer.
        """
        check_positive_integers(num_batches=num_batches, passes=passes)
        self.num_batches = num_batches
        self.passes = passes
        self._batches: deque[Any] = deque(maxlen=num_batches)
        self._last_step = 0
        self._is_done = False

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out when training ends; called as `on_train_start` is.

        Raises:
            ConfigError: If the module uses manual optimization, or its number of steps is not known.
        """
        if not pl_module.automatic_optimization:
            raise ConfigError(
                "calibration",
                "must be null for a module with manual optimization",
                fix="Call calibrate() on what balance_() returns after training.",
            )
        if math.isinf(trainer.estimated_stepping_batches):
            raise ConfigError("calibration", "must be null unless max_steps or max_epochs ends the training")
        self._last_step = int(trainer.estimated_stepping_batches)
        self._is_done = False
        self._batches.clear()

    def take(self, trainer: Trainer, pl_module: LightningModule, balanced: BalancedModel, batch: Any) -> None:
        """Keep a batch, and calibrate after the last one; called as `on_train_batch_end` is."""
        self._batches.append(batch)
        if trainer.global_step != self._last_step or self._is_done:
            return
        with _without_logging(pl_module), trainer.precision_plugin.val_step_context():
            balanced.calibrate(self._run, num_batches=self.num_batches, passes=self.passes)
        self._batches.clear()
        self._is_done = True

    def _run(self, model: nn.Module) -> None:
        assert isinstance(model, LightningModule)
        indexed = is_param_in_hook_signature(model.training_step, "batch_idx", min_args=2)
        for index, batch in enumerate(self._batches):
            model.training_step(batch, index) if indexed else model.training_step(batch)


@contextmanager
def _without_logging(pl_module: LightningModule) -> Iterator[None]:
    """Drop what training steps log: it would replace what the last real step logged."""
    silenced = {"log": lambda *_, **__: None, "log_dict": lambda *_, **__: None}
    pl_module.__dict__.update(silenced)
    try:
        yield
    finally:
        for name in silenced:
            del pl_module.__dict__[name]
