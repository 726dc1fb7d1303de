"""Show the load over experts while a model trains."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from moe_plugin.attach.balanced_model import BalancedModel, find_balanced
from moe_plugin.attach.settings import BalanceSettings
from moe_plugin.callbacks.attachment import Attachment
from moe_plugin.callbacks.loss_free import LossFreeBalancing
from moe_plugin.callbacks.monitor.load_alarms import AlarmWatch, OnAlarm
from moe_plugin.callbacks.monitor.load_tags import Detail, check_detail
from moe_plugin.callbacks.monitor.training_watch import TrainingWatch
from moe_plugin.callbacks.monitor.validation_watch import ValidationWatch
from moe_plugin.errors import AttachError
from moe_plugin.metrics import LayerLoad
from moe_plugin.metrics.alarms import Alarm, Limits
from moe_plugin.number_checks import check_integer
from moe_plugin.types import LoadRecord


class LoadMonitor(Callback):
    """Logs how balanced the load over experts is, in training and in validation.

    Training: every `every_n_steps` optimizer steps the load of the steps since then goes to every logger as
    scalars (`load/*` over all layers, `load_layers/*` by layer), and now and then as pictures to loggers that take
    images: layer x expert load, and load and bias over time by layer. TensorBoard's text tab then names the experts
    with most and fewest tokens. Validation: MaxVio (arXiv 2408.15664),
    entropy and dead experts over the validation set are logged as `val/*`, for checkpoints and sweepers, and pictures
    show which domains and token classes experts take, and which work together. If tokens use different numbers of
    experts, pictures show which tokens use how many.

    Alarms: each problem with the load is reported once, with what to do about it: dead experts, a collapse, a bias that
    swings, saturates or runs away, no improvement, a router without tokens, ranks that diverge, NaN.

    Works with `LossFreeBalancing`, and alone: then it observes the model's routers and changes nothing.

    Args:
        every_n_steps: Optimizer steps between scalars; None for the trainer's `log_every_n_steps`.
        image_every_n_steps: Optimizer steps between heatmaps; None for growing intervals (the first step, the 1st,
            2nd, 4th, 8th, ... window, and the last), about a dozen in a run of any length. 0 for no heatmaps.
        on_alarm: 'warn' with a `LoadAlarmWarning`, 'raise' a `LoadAlarmError`, or call a function with the `Alarm` on
            the first rank; None turns alarms off.
        alarm_limits: How long a problem must last before it is an alarm.
        detail: 'full' logs scalars over all layers and those of each layer; 'brief' leaves out those of each layer,
            which are hundreds in a model of 60. Pictures and alarms show single layers in any case.

    Attributes:
        training: What was seen in training.
        validation: What was seen in the last validation run.

    Raises:
        ConfigError: If a setting is negative, `every_n_steps` is 0, or 'on_alarm' or 'detail' is not one of these.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        image_every_n_steps: int | None = None,
        on_alarm: OnAlarm = "warn",
        alarm_limits: Limits = Limits(),  # noqa: B008 (frozen)
        detail: Detail = "full",
    ) -> None:
        """Check the settings."""
        check_detail(detail)
        check_integer("every_n_steps", every_n_steps, or_none=True)
        check_integer("image_every_n_steps", image_every_n_steps, least=0, or_none=True)
        self._watch = AlarmWatch(on_alarm, alarm_limits)
        self._observer = Callback()  # does nothing if something else counts
        self.training = TrainingWatch(every_n_steps, image_every_n_steps, self._watch, detail)
        self.validation = ValidationWatch(image_every_n_steps, detail)

    @property
    def alarms(self) -> list[Alarm]:
        """The alarms so far."""
        return self._watch.alarms

    @property
    def first_record(self) -> LoadRecord | None:
        """The load of the first optimizer step, on the CPU: the model before balancing."""
        return self.training.first_record

    @property
    def training_load(self) -> dict[str, LayerLoad]:
        """The load of each layer in the last window that was logged."""
        return self.training.load

    @property
    def validation_load(self) -> dict[str, LayerLoad]:
        """The load of each layer in the last validation run."""
        return self.validation.load

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Observe the routers unless they are counted already.

        Raises:
            AttachError: If no router is found.
        """
        is_counted = find_balanced(pl_module) is not None
        if not is_counted and not any(isinstance(other, LossFreeBalancing) for other in trainer.callbacks):  # pyright: ignore
            self._observer = Attachment(BalanceSettings(rule=None))
            self._observer.setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to follow the steps."""
        self._observer.on_train_start(trainer, pl_module)
        self.training.start_(trainer, pl_module, _balanced(pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *given: Any) -> None:
        """Count steps from here on."""
        self._observer.on_train_batch_start(trainer, pl_module, *given)
        self.training.batch_starts(trainer, _balanced(pl_module))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Leave out the load of a step whose loss is not finite."""
        self._observer.on_before_backward(trainer, pl_module, loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *given: Any) -> None:
        """Expect a step, unless the gradient scaler prevents it."""
        self._observer.on_before_optimizer_step(trainer, pl_module, *given)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *given: Any) -> None:
        """Take in the optimizer step of this batch, if it made one."""
        self._observer.on_train_batch_end(trainer, pl_module, *given)
        self.training.batch_ends(trainer, _balanced(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what is left to log."""
        self._observer.on_train_end(trainer, pl_module)
        self.training.end_(trainer, _balanced(pl_module))
        self.validation.write_waiting(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to follow a validation run, which does not count as training time."""
        self.training.clock.pause()
        self.validation.start_(trainer, _balanced(pl_module))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any
    ) -> None:
        """Take in the tokens of a batch."""
        self.validation.batch_starts(batch)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Take in the outputs of a batch."""
        self.validation.batch_ends(outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the validation run."""
        self.validation.end_(trainer, pl_module, _balanced(pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue to measure training time."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.training.clock.go()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run cannot see again: the load of the first step, and of the windows since then."""
        return self.training.state_dict() | {"validation_pictures": self.validation.pictures.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.training.load_state_dict(state_dict)
        self.validation.pictures.load_state_dict(state_dict.get("validation_pictures", {}))


def _balanced(pl_module: LightningModule) -> BalancedModel:
    balanced = find_balanced(pl_module)
    if balanced is None:
        raise AttachError(
            "LoadMonitor found no balanced router in the model. Was remove() called on it, or is it attached to "
            "a part of the model only?"
        )
    return balanced
