"""When to attach, update and log in a Hugging Face ``Trainer``, for all callbacks that count.

Not imported by ``moe_plugin`` itself: this file needs transformers.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moe_plugin.attach.balance import balance_as_set_, settle_own_losses_
from moe_plugin.attach.balanced_model import BalancedModel
from moe_plugin.attach.settings import BalanceSettings
from moe_plugin.callbacks.monitor.load_log import LoadLog
from moe_plugin.callbacks.monitor.load_tags import Detail
from moe_plugin.losses.in_model import losses_of_trainer


class TrainerAttachment(TrainerCallback):
    """Attaches when training begins, updates once per optimizer step, and adds the load to what the Trainer logs.

    Attributes:
        balanced: The sites of the model, once training has begun.
    """

    balanced: BalancedModel

    def __init__(self, settings: BalanceSettings, detail: Detail) -> None:
        """Prepare for a run.

        Args:
            settings: How to balance.
            detail: Which scalars are logged.

        Raises:
            ConfigError: If 'detail' is neither 'brief' nor 'full'.
        """
        self._settings = settings
        self._log = LoadLog(detail)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach.

        Raises:
            AttachError: If no router is found, or experts are to be fused and some cannot.
        """
        model: nn.Module = kwargs["model"]
        self.balanced = balance_as_set_(model, self._settings)
        self.balanced.discard_counts_()
        self._log.start_(model, self.balanced)
        trainer = _calling_trainer()
        if trainer is not None:
            settle_own_losses_(self.balanced, losses_of_trainer(trainer))
            # Before those of `report_to`, which write what this one adds to the logs.
            others = [each for each in trainer.callback_handler.callbacks if each is not self]
            trainer.callback_handler.callbacks = [self, *others]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update, unless the gradient scaler skipped the step."""
        optimizer: Optimizer = kwargs["optimizer"]
        if getattr(optimizer, "step_was_skipped", False):
            self.balanced.discard_counts_()
        else:
            self._log.add_(self.balanced.update())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the load to what the Trainer logs of training, for the callbacks of ``report_to`` and its history."""
        if logs is not None and "loss" in logs:
            scalars = self._log.take()
            logs.update(scalars)
            state.log_history[-1].update(scalars)


def _calling_trainer() -> Trainer | None:
    """Return the Trainer whose event this is: it gives its callbacks no other way to it, or to one another."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back
    return None
