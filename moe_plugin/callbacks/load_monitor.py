"""Shows the load over experts while a model trains.

Shape legend: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from moe_plugin.balance import Balanced, balance_, find_balanced
from moe_plugin.callbacks.attachment import Attachment
from moe_plugin.callbacks.experts_per_token import ExpertsPerToken
from moe_plugin.callbacks.image_log import log_image, tensorboard_writers
from moe_plugin.callbacks.load_alarms import AlarmWatch, OnAlarm
from moe_plugin.callbacks.load_film import LoadFilm
from moe_plugin.callbacks.load_pictures import LoadPictures, counts_of
from moe_plugin.callbacks.load_tags import DASHBOARD, budget_scalars, training_scalars, validation_scalars
from moe_plugin.callbacks.loss_free import LossFreeBalancing
from moe_plugin.callbacks.router_sample import RouterSample
from moe_plugin.callbacks.run_card import active_parameters, run_card
from moe_plugin.callbacks.specialisation import Specialisation, kinds_of
from moe_plugin.callbacks.token_clock import TokenClock
from moe_plugin.callbacks.validation_counts import ValidationCounts
from moe_plugin.errors import AttachError, ConfigError
from moe_plugin.metrics import LayerLoad, LoadWindow
from moe_plugin.metrics.alarms import Alarm, Limits
from moe_plugin.types import LoadRecord


class LoadMonitor(Callback):
    """Logs how balanced the load over experts is, in training and in validation.

    Training: every `every_n_steps` optimizer steps the load of the steps since then goes to every logger as
    scalars (`load/*` over all layers, `load_layers/*` by layer), and now and then as pictures to loggers that take
    images: layer x expert load, and load and bias over time by layer. Validation: MaxVio (arXiv 2408.15664),
    entropy and dead experts over the whole validation set are logged as `val/*`, so that checkpoints and sweepers
    can follow them, and pictures show which domains and token classes experts take, and which work together.

    Alarms: what is wrong with the load is said once, in words, with what to do about it: dead experts, a collapse, a
    bias that swings, saturates or runs away, no improvement, a router without tokens, ranks that diverge, NaN.

    Works beside `LossFreeBalancing`, and alone: then it observes the model's routers and changes nothing.

    Args:
        every_n_steps: Optimizer steps between scalars; None for the trainer's `log_every_n_steps`.
        image_every_n_steps: Optimizer steps between heatmaps; None for growing intervals (the 1st, 2nd, 4th,
            8th, ... window), about ten in a run of any length. 0 for no heatmaps.
        on_alarm: 'warn' with a `LoadAlarmWarning`, 'raise' a `LoadAlarmError`, or call a function with the `Alarm` on
            the first rank; None looks for nothing.
        alarm_limits: How long something must last before it is worth an alarm.

    Attributes:
        first_record: The load of the first optimizer step, on the host: how the model was before balancing.
        training_load: The load of each layer in the last window that was logged.
        validation_load: The load of each layer in the last validation run.
        bias_ranges: The range of each layer's bias when it was last logged.

    Raises:
        ConfigError: A setting is negative, `every_n_steps` is 0, or 'on_alarm' is none of these.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        image_every_n_steps: int | None = None,
        on_alarm: OnAlarm = "warn",
        alarm_limits: Limits = Limits(),  # noqa: B008 (frozen)
    ) -> None:
        """Check the settings."""
        _check_interval("every_n_steps", every_n_steps, least=1)
        _check_interval("image_every_n_steps", image_every_n_steps, least=0)
        self.every_n_steps = every_n_steps
        self.image_every_n_steps = image_every_n_steps
        self.first_record: LoadRecord | None = None
        self.training_load: dict[str, LayerLoad] = {}
        self.validation_load: dict[str, LayerLoad] = {}
        self.bias_ranges: dict[str, float] = {}
        self._training_pictures = LoadPictures("load", image_every_n_steps)
        self._validation_pictures = LoadPictures("val", image_every_n_steps)
        self._window: LoadWindow | None = None
        self._validation: ValidationCounts | None = None
        self._last_record: LoadRecord | None = None
        self._observer: Attachment | None = None
        self._experts_per_token = ExpertsPerToken()
        self._watch = AlarmWatch(on_alarm, alarm_limits)
        self._sample = RouterSample()
        self._film: LoadFilm | None = None
        self._clock = TokenClock()
        self._specialisation = Specialisation()
        self._expert_share = 0.0
        self._constants: dict[str, float] = {}
        self._token_classes: Tensor | None = None

    @property
    def alarms(self) -> list[Alarm]:
        """Everything that was found wrong so far."""
        return self._watch.alarms

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Observe the routers if nothing else has them counted.

        Raises:
            AttachError: If no router is found.
        """
        is_counted = find_balanced(pl_module) is not None
        if not is_counted and not any(isinstance(other, LossFreeBalancing) for other in trainer.callbacks):  # pyright: ignore
            self._observer = Attachment(lambda module: balance_(module, rule=None))
            self._observer.setup(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lay out TensorBoard's custom scalars, and write down what the run is."""
        if self._observer is not None:
            self._observer.start(trainer)
        balanced = _balanced(pl_module)
        self._window = LoadWindow({name: site.num_routed for name, site in balanced.items()})
        self._last_record = balanced.record
        self._film = LoadFilm(list(balanced))
        size = active_parameters(pl_module)
        if size is not None:
            self._expert_share = size.expert_share
            self._constants = {"load/active_parameters": float(size.active)}
        for writer in tensorboard_writers(self._loggers(trainer)):
            writer.add_custom_scalars(DASHBOARD)
            writer.add_text("run", run_card(trainer, pl_module, balanced), global_step=0)
        self._clock.go()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Steps count from here on; routers are looked at in the step that ends a window."""
        if self._observer is not None:
            self._observer.batch_starts()
        balanced = _balanced(pl_module)
        if self._ends_window(trainer, balanced.step + 1):
            self._sample.start_(balanced)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The load of a step whose loss is not finite tells nothing."""
        if self._observer is not None:
            self._observer.backward_starts(loss)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """A step follows, unless the gradient scaler prevents it."""
        if self._observer is not None:
            self._observer.step_is_due(optimizer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Take in the optimizer step of this batch, if it made one."""
        if self._observer is not None:
            self._observer.batch_ends()
        balanced = _balanced(pl_module)
        self._sample.stop_(balanced)
        record = balanced.record
        if record is None or record is self._last_record:
            return
        assert self._window is not None
        self._last_record = record
        self._window.add_(record.counts)
        self._experts_per_token.add_(record)
        if self.first_record is None:
            self.first_record = LoadRecord(
                record.step, _on_host(record.counts), _on_host(record.tokens), _on_host(record.bias)
            )
            self._offer(trainer, self._training_pictures, self._window.layer_loads(), _logged_step(trainer))
        if self._ends_window(trainer, record.step):
            self._log_training(trainer, balanced, record, _logged_step(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the steps since the last window, and the last pictures."""
        if self._observer is not None:
            self._observer.stop()
        balanced = _balanced(pl_module)
        record = balanced.record
        if record is not None and self._window is not None and self._window.batches:
            # Lightning has moved on by one since the last batch.
            self._log_training(trainer, balanced, record, step=_logged_step(trainer) - 1)
        if self._training_pictures.write_waiting(self._loggers(trainer)) and record is not None:
            self._draw_film(trainer, record, _logged_step(trainer) - 1)
        self._validation_pictures.write_waiting(self._loggers(trainer))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what was counted in evaluation mode before."""
        self._clock.pause()
        balanced = _balanced(pl_module)
        self._validation = ValidationCounts(balanced)
        if self._loggers(trainer) and self.image_every_n_steps != 0 and not trainer.sanity_checking:
            data: Any = getattr(trainer, "datamodule", None)
            names, self._token_classes = getattr(data, "token_classes", ([], None))
            kinds = {"domain": list(getattr(data, "domains", [])), "token class": list(names)}
            self._specialisation.start_(balanced, {kind: names for kind, names in kinds.items() if names})

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any
    ) -> None:
        """See what kinds of tokens come."""
        self._specialisation.batch_starts(kinds_of(batch, self._token_classes))

    def on_validation_batch_end(self, *_: Any) -> None:
        """Keep the counts of the batch."""
        assert self._validation is not None
        self._validation.take_()
        self._specialisation.batch_ends()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the load over the whole validation set."""
        assert self._validation is not None
        self._specialisation.stop_(_balanced(pl_module))
        if trainer.sanity_checking:
            return
        window = LoadWindow({name: site.num_routed for name, site in _balanced(pl_module).items()})
        load = self._validation.reduced(trainer.strategy.root_device)
        window.add_batches_(load.tokens_per_expert_NLE)
        self.validation_load = window.layer_loads()
        scalars = validation_scalars(self.validation_load)
        scalars["val/experts_per_token"] = load.experts_per_token()
        pl_module.log_dict(scalars, sync_dist=trainer.world_size > 1)
        is_fitting = trainer.state.fn == TrainerFn.FITTING
        # After a fit the step is that of its last batch, counted from zero like all steps that are logged.
        step = _logged_step(trainer) if is_fitting else max(trainer.global_step - 1, 0)
        is_drawn = self._offer(trainer, self._validation_pictures, self.validation_load, step)
        if not is_fitting:
            is_drawn |= self._validation_pictures.write_waiting(self._loggers(trainer))
        if is_drawn:
            for tag, image in self._specialisation.images():
                log_image(self._loggers(trainer), tag, image, step)
        kept = self._specialisation.kept_choices()
        if kept is not None and is_fitting:
            for logger in self._loggers(trainer):
                logger.log_metrics({"val/kept_choices": kept}, step=step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training goes on."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._clock.go()

    def state_dict(self) -> dict[str, Any]:
        """The load of the first step, so that a resumed run still knows how it began."""
        if self.first_record is None:
            return {}
        return {"first_record": vars(self.first_record)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the load of the first step."""
        if "first_record" in state_dict:
            self.first_record = LoadRecord(**state_dict["first_record"])

    def _ends_window(self, trainer: Trainer, update: int) -> bool:
        every_n_steps = self.every_n_steps or trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        return bool(every_n_steps) and update % every_n_steps == 0

    def _log_training(self, trainer: Trainer, balanced: Balanced, record: LoadRecord, step: int) -> None:
        assert self._window is not None
        self.training_load = self._window.layer_loads()
        self.bias_ranges = _ranges(record.bias)
        self._window.reset_()
        decisions = self._sample.take()
        scalars = training_scalars(self.training_load, self.bias_ranges, decisions, self._expert_share)
        used = self._experts_per_token.take()
        scalars |= self._constants | budget_scalars(used.experts_per_token)
        scalars["load/tokens_per_second"] = self._clock.rate(used.tokens)
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=step)
        assert self._film is not None
        if self._loggers(trainer) and self.image_every_n_steps != 0:
            self._film.add_(step, self.training_load, record.bias)
        if self._offer(trainer, self._training_pictures, self.training_load, step):
            self._draw_film(trainer, record, step)
        new = self._watch.window_ends(
            balanced, self.training_load, self.bias_ranges, decisions, is_first_rank=trainer.is_global_zero
        )
        for writer in tensorboard_writers(self._loggers(trainer)) if new else ():
            writer.add_text("alarms", "\n\n".join(map(str, new)), global_step=step)

    def _draw_film(self, trainer: Trainer, record: LoadRecord, step: int) -> None:
        assert self._film is not None
        for tag, image in self._film.images():
            log_image(self._loggers(trainer), tag, image, step)
        for writer in tensorboard_writers(self._loggers(trainer)):
            for name, bias_E in record.bias.items():
                writer.add_histogram(f"bias/{name}", bias_E.float().cpu(), global_step=step, bins="auto")

    def _offer(
        self, trainer: Trainer, pictures: LoadPictures, loads: Mapping[str, LayerLoad], step: int
    ) -> bool:
        if self.image_every_n_steps == 0:
            return False
        violation = fmean(load.max_violation_global for load in loads.values())
        dead = sum(load.dead_experts for load in loads.values())
        title = f"load over ideal load, step {trainer.global_step}: MaxVio {violation:.2f}, {dead} dead"
        return pictures.offer(self._loggers(trainer), step, counts_of(loads), title)

    def _loggers(self, trainer: Trainer) -> list[Logger]:
        return trainer.loggers if trainer.is_global_zero else []


def _balanced(pl_module: LightningModule) -> Balanced:
    balanced = find_balanced(pl_module)
    if balanced is None:
        raise AttachError(
            "LoadMonitor found no balanced router in the model. Was remove() called on it, or is it attached to "
            "a part of the model only?"
        )
    return balanced


def _logged_step(trainer: Trainer) -> int:
    """The x-axis of everything that Lightning logs itself."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _ranges(bias: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest minus smallest bias by site, with one wait for the device."""
    ranges_L = torch.stack([bias_E.max() - bias_E.min() for bias_E in bias.values()])
    return dict(zip(bias, ranges_L.tolist(), strict=True))


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _check_interval(name: str, value: int | None, *, least: int) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ConfigError(f"'{name}' must be null or an integer >= {least}, got {value!r}.")
