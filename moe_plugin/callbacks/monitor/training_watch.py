"""The load of the training steps of each window: scalars, pictures and alarms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from moe_plugin.attach.balanced_model import BalancedModel
from moe_plugin.callbacks.monitor.extreme_experts import extreme_experts
from moe_plugin.callbacks.monitor.image_log import log_image
from moe_plugin.callbacks.monitor.load_alarms import AlarmWatch
from moe_plugin.callbacks.monitor.load_over_time import LoadOverTime
from moe_plugin.callbacks.monitor.load_pictures import LoadPictures
from moe_plugin.callbacks.monitor.load_tags import (
    Detail,
    budget_scalars,
    dashboard,
    shown,
    training_scalars,
)
from moe_plugin.callbacks.monitor.loggers import first_rank_loggers, logged_step, tensorboard_writers
from moe_plugin.callbacks.monitor.mean_experts_per_token import MeanExpertsPerToken
from moe_plugin.callbacks.monitor.router_sample import RouterSample
from moe_plugin.callbacks.monitor.run_card import active_parameters, run_card
from moe_plugin.callbacks.monitor.token_clock import TokenClock
from moe_plugin.metrics import LayerLoad, LoadWindow
from moe_plugin.metrics.router_names import short_names
from moe_plugin.types import LoadRecord


class TrainingWatch:
    """A watch on the optimizer steps of a fit.

    Args:
        every_n_steps: Optimizer steps in a window; None for the trainer's `log_every_n_steps`.
        image_every_n_steps: See `LoadMonitor`.
        alarms: The watch that raises alarms.
        detail: Which scalars are logged.

    Attributes:
        first_record: The load of the first optimizer step, on the host.
        load: The load of each layer in the last window.
        bias_ranges: The range of each layer's bias at its end.
        clock: Runs while the model trains.
    """

    def __init__(
        self,
        every_n_steps: int | None,
        image_every_n_steps: int | None,
        alarms: AlarmWatch,
        detail: Detail = "full",
    ) -> None:
        """Start without a step."""
        self.first_record: LoadRecord | None = None
        self.load: dict[str, LayerLoad] = {}
        self.bias_ranges: dict[str, float] = {}
        self.clock = TokenClock()
        self._every_n_steps = every_n_steps
        self._draws = image_every_n_steps != 0
        self._alarms = alarms
        self._detail: Detail = detail
        self._pictures = LoadPictures("load", image_every_n_steps)
        self._sample = RouterSample()
        self._used = MeanExpertsPerToken()
        self._expert_share = 0.0
        self._constants: dict[str, float] = {}
        self._over_time = LoadOverTime([])

    def start_(self, trainer: Trainer, pl_module: LightningModule, balanced: BalancedModel) -> None:
        """Lay out TensorBoard's custom scalars, and describe the run.

        Args:
            trainer: Whose loggers are written to.
            pl_module: The model.
            balanced: Its routers.
        """
        self._window = LoadWindow({name: site.num_routed for name, site in balanced.items()})
        self._last_record = balanced.record
        self._over_time = LoadOverTime(list(balanced), self._over_time.state_dict())
        self._short = short_names(balanced)
        self._targets = {name: site.target_k for name, site in balanced.items() if site.target_k is not None}
        size = active_parameters(pl_module)
        if size is not None:
            self._expert_share = size.expert_share
            self._constants = {"load/active_parameters": float(size.active)}
        for writer in tensorboard_writers(first_rank_loggers(trainer)):
            writer.add_custom_scalars(dashboard(experts_vary=bool(self._targets), detail=self._detail))
            writer.add_text("run", run_card(trainer, pl_module, balanced), global_step=0)
        self.clock.go()

    def batch_starts(self, trainer: Trainer, balanced: BalancedModel) -> None:
        """Look at the routers if the step ends a window; see `start_`."""
        if self._ends_window(trainer, balanced.step + 1):
            self._sample.start_(balanced)

    def batch_ends(self, trainer: Trainer, balanced: BalancedModel) -> None:
        """Take in the optimizer step of this batch, if it made one; see `start_`."""
        self._sample.stop_(balanced)
        record = balanced.record
        if record is None or record is self._last_record:
            return
        self._last_record = record
        self._window.add_(record.counts)
        self._used.add_(record)
        if self.first_record is None:
            self.first_record = LoadRecord(
                record.step, _on_host(record.counts), _on_host(record.tokens), _on_host(record.bias)
            )
            if self._draws:
                self._pictures.write_first(trainer, logged_step(trainer), self._window.layer_loads())
        if self._ends_window(trainer, record.step):
            self._end_window(trainer, balanced, record, logged_step(trainer))

    def end_(self, trainer: Trainer, balanced: BalancedModel) -> None:
        """Log the steps since the last window, and the last pictures; see `start_`."""
        # Lightning has moved on by one since the last batch.
        step, record = logged_step(trainer) - 1, balanced.record
        if record is not None and self._window.batches:
            self._end_window(trainer, balanced, record, step)
        if self._pictures.write_waiting(first_rank_loggers(trainer)):
            self._draw_over_time(trainer, step)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to continue the pictures, and the load of the first step."""
        first = {} if self.first_record is None else {"first_record": vars(self.first_record)}
        return first | {"pictures": self._pictures.state_dict(), "film": self._over_time.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned, or an older version of it."""
        if "first_record" in state:
            self.first_record = LoadRecord(**state["first_record"])
        self._pictures.load_state_dict(state.get("pictures", {}))
        film = state.get("film", {})
        self._over_time = LoadOverTime(film.get("names", []), film)

    def _ends_window(self, trainer: Trainer, update: int) -> bool:
        every_n_steps = self._every_n_steps or trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        return bool(every_n_steps) and update % every_n_steps == 0

    def _end_window(self, trainer: Trainer, balanced: BalancedModel, record: LoadRecord, step: int) -> None:
        self.load, self.bias_ranges = self._window.layer_loads(), bias_ranges(record.bias)
        self._window.reset_()
        decisions = self._sample.take()
        scalars = training_scalars(self.load, self.bias_ranges, decisions, self._expert_share)
        used = self._used.take()
        scalars |= self._constants | budget_scalars(used.experts_per_token, self._targets)
        scalars["load/tokens_per_second"] = self.clock.rate(used.tokens)
        scalars = shown(scalars, self._short, self._detail)
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=step)
        loggers = first_rank_loggers(trainer)
        if loggers and self._draws:
            self._over_time.add_(step, self.load, record.bias, decisions)
            if self._pictures.offer(trainer, step, self.load):
                self._draw_over_time(trainer, step)
        new = self._alarms.window_ends(
            balanced, self.load, self.bias_ranges, decisions, is_first_rank=trainer.is_global_zero
        )
        for writer in tensorboard_writers(loggers) if new else ():
            writer.add_text("alarms", "\n\n".join(map(str, new)), global_step=step)

    def _draw_over_time(self, trainer: Trainer, step: int) -> None:
        loggers = first_rank_loggers(trainer)
        for tag, image in self._over_time.images():
            log_image(loggers, tag, image, step)
        for writer in tensorboard_writers(loggers) if self.load else ():
            writer.add_text("load/extreme_experts", extreme_experts(self.load), global_step=step)


def bias_ranges(bias: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the largest minus the smallest bias of each site, with one wait for the device."""
    ranges_L = torch.stack([bias_E.max() - bias_E.min() for bias_E in bias.values()])
    return dict(zip(bias, ranges_L.tolist(), strict=True))


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
