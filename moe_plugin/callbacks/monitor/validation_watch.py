"""The load of a validation run, and what its experts do."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from moe_plugin.attach.balanced_model import BalancedModel
from moe_plugin.attach.selection import Selection
from moe_plugin.attach.site import Site
from moe_plugin.callbacks.monitor.experts_used_watch import ExpertsUsedWatch
from moe_plugin.callbacks.monitor.image_log import log_image
from moe_plugin.callbacks.monitor.load_pictures import LoadPictures
from moe_plugin.callbacks.monitor.load_tags import Detail, shown, validation_scalars
from moe_plugin.callbacks.monitor.loggers import (
    first_rank_loggers,
    log_folder,
    logged_step,
    tensorboard_writers,
)
from moe_plugin.callbacks.monitor.specialisation import Specialisation
from moe_plugin.callbacks.monitor.token_kinds import TokenKinds
from moe_plugin.callbacks.monitor.validation_counts import ValidationCounts
from moe_plugin.metrics import LayerLoad, LoadWindow
from moe_plugin.metrics.router_names import short_names
from moe_plugin.plots.run_data import EXPERT_USE_FILE


class ValidationWatch:
    """A watch on validation runs.

    Args:
        image_every_n_steps: See `LoadMonitor`.
        detail: Which scalars are logged.

    Attributes:
        load: The load of each layer in the last validation run.
        specialisation: The kinds of tokens that each expert takes.
        used: How many experts tokens use.
        pictures: The heatmaps of the load.
    """

    def __init__(self, image_every_n_steps: int | None, detail: Detail = "full") -> None:
        """Start without a batch."""
        self._detail: Detail = detail
        self.load: dict[str, LayerLoad] = {}
        self.specialisation = Specialisation()
        self.used = ExpertsUsedWatch()
        self.pictures = LoadPictures("val", image_every_n_steps)
        self._draws = image_every_n_steps != 0
        self._looks = False
        self._kinds = TokenKinds(None)

    def start_(self, trainer: Trainer, balanced: BalancedModel) -> None:
        """Forget earlier counts of evaluation mode; look at the routers if pictures are due.

        Args:
            trainer: Whose loggers are written to.
            balanced: The routers.
        """
        self._counts = ValidationCounts(balanced)
        self._short = short_names(balanced)
        self._looks = bool(first_rank_loggers(trainer)) and self._draws and not trainer.sanity_checking
        if self._looks:
            self._kinds = TokenKinds(getattr(trainer, "datamodule", None))
            self.specialisation.start_(balanced, self._kinds)
            self.used.start_(balanced, self._kinds)
            for name, site in balanced.items():
                site.witnesses[self] = partial(self._look, name, site)

    def batch_starts(self, batch: Any) -> None:
        """Expect the tokens of this batch."""
        if self._looks:
            tokens = self._kinds.of(batch)
            self.specialisation.batch_starts(tokens)
            self.used.batch_starts(tokens)

    def batch_ends(self, outputs: Any) -> None:
        """Keep the counts of the batch."""
        self._counts.take_()
        if self._looks:
            self.specialisation.batch_ends()
            self.used.batch_ends(outputs)

    def end_(self, trainer: Trainer, pl_module: LightningModule, balanced: BalancedModel) -> None:
        """Log the load over the validation set, and what its experts do.

        Args:
            trainer: Whose loggers are written to.
            pl_module: The model, which logs the scalars.
            balanced: Its routers.
        """
        for site in balanced.values():
            site.witnesses.pop(self, None)
        if trainer.sanity_checking:
            return
        window = LoadWindow({name: site.num_routed for name, site in balanced.items()})
        load = self._counts.reduced(trainer.strategy.root_device)
        window.add_batches_(load.tokens_per_expert_NLE)
        self.load = window.layer_loads()
        scalars = validation_scalars(self.load)
        if any(site.target_k is not None for site in balanced.values()):
            scalars["val/experts_per_token"] = load.experts_per_token()
        pl_module.log_dict(scalars, sync_dist=trainer.world_size > 1)
        self._show(trainer)

    def write_waiting(self, trainer: Trainer) -> None:
        """Write the last picture."""
        self.pictures.write_waiting(first_rank_loggers(trainer))

    def _show(self, trainer: Trainer) -> None:
        is_fitting = trainer.state.fn == TrainerFn.FITTING
        # After a fit the step is that of its last batch, counted from zero like all steps that are logged.
        step = logged_step(trainer) if is_fitting else max(trainer.global_step - 1, 0)
        loggers = first_rank_loggers(trainer)
        is_drawn = self._draws and self.pictures.offer(trainer, step, self.load)
        if not is_fitting:
            is_drawn |= self.pictures.write_waiting(loggers)
        if not self._looks:
            return
        scalars = self.specialisation.scalars() if is_fitting else {}
        scalars = shown(scalars | self.used.scalars(), self._short, self._detail)
        for logger in loggers if scalars else ():
            logger.log_metrics(scalars, step=step)
        for tag, image in (*self.specialisation.images(), *self.used.images()) if is_drawn else ():
            log_image(loggers, tag, image, step)
        for writer in tensorboard_writers(loggers) if is_drawn else ():
            for tag, text in self.specialisation.texts():
                writer.add_text(tag, text, global_step=step)
        folder = log_folder(loggers)
        if folder is not None:
            record = {
                "step": step,
                "experts": self.specialisation.record(),
                "experts_per_token": self.used.record(),
            }
            (folder / EXPERT_USE_FILE).write_text(json.dumps(record), encoding="utf-8")

    def _look(self, name: str, site: Site, selection: Selection, valid_T: Tensor | None) -> None:
        self.specialisation.look(name, site, selection, valid_T)
        self.used.look(name, site, selection, valid_T)
