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

import torch.distributed as dist
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from moe_plugin.attach.balanced_model import BalancedModel
from moe_plugin.errors import ConfigError
from moe_plugin.number_checks import check_positive_integers

KEY = "calibration_batches"
"""Of the batches in a checkpoint."""
_CONSEQUENCE = (
    "A run that is resumed in its last steps calibrates on fewer batches. Batches of dict, list, tuple and "
    "tensors can be held."
)


class Calibration:
    """Keeps the last training batches, and solves for the biases in the last step, before its checkpoint is written.

    The batches go through ``training_step`` again, without gradients and in evaluation mode, ``passes + 1`` times.

    Attributes:
        num_batches: The last batches of each rank, to balance on. They stay in memory until the end, and checkpoints of
            the last ``num_batches`` steps hold those seen so far, of all ranks.
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
        self._saved: list[Any] = []

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
        saved = self._saved[trainer.global_rank] if len(self._saved) == trainer.world_size else []
        self._saved = []
        self._batches.clear()
        self._batches.extend(move_data_to_device(saved, trainer.strategy.root_device))

    def take(self, trainer: Trainer, pl_module: LightningModule, balanced: BalancedModel, batch: Any) -> None:
        """Keep a batch, and calibrate after the last one; called as `on_train_batch_end` is."""
        self._batches.append(batch)
        if trainer.global_step != self._last_step or self._is_done:
            return
        with _without_logging(pl_module), trainer.precision_plugin.val_step_context():
            balanced.calibrate(self._run, num_batches=self.num_batches, passes=self.passes)
        self._batches.clear()
        self._is_done = True

    def save(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Add the batches that will be among the last ones; called as `on_save_checkpoint` is, on all ranks.

        Args:
            trainer: Knows how many steps are to come; each takes at least one batch.
            checkpoint: Gets the batches of each rank, in what ``torch.load(weights_only=True)`` reads.
        """
        kept = self.num_batches - (self._last_step - trainer.global_step)
        if kept <= 0 or not self._batches:
            return
        try:
            batches = _plain(list(self._batches)[-kept:])
        except TypeError as error:
            rank_zero_warn(f"Checkpoints cannot hold the batches of 'calibration': {error}. {_CONSEQUENCE}")
            return
        ranks: list[Any] = [batches]
        if trainer.world_size > 1:
            ranks = [None] * trainer.world_size
            dist.gather_object(batches, ranks if trainer.is_global_zero else None)
        checkpoint[KEY] = ranks

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Keep what `save` added until training starts; called as `on_load_checkpoint` is."""
        self._saved = checkpoint.get(KEY, [])

    def _run(self, model: nn.Module) -> None:
        assert isinstance(model, LightningModule)
        indexed = is_param_in_hook_signature(model.training_step, "batch_idx", min_args=2)
        for index, batch in enumerate(self._batches):
            model.training_step(batch, index) if indexed else model.training_step(batch)


def _plain(value: Any) -> Any:
    """Return a copy that ``torch.load(weights_only=True)`` reads, on the CPU.

    Raises:
        TypeError: Some part would not be read.
    """
    if type(value) is Tensor:
        return value.detach().cpu().clone()  # saved as it is, a view brings all of its storage
    if type(value) is dict:
        return {key: _plain(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    raise TypeError(f"they contain {type(value).__name__}")


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
