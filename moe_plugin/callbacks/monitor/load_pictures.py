"""Pictures of the load in every logger that takes images, few enough to keep long runs small.

Shape legend: L MoE layers, E experts (of the layer that has most).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor

from moe_plugin.callbacks.monitor.image_log import log_image
from moe_plugin.callbacks.monitor.loggers import first_rank_loggers, tensorboard_writers
from moe_plugin.metrics import LayerLoad, stack_layers
from moe_plugin.plots import load_heatmap


class LoadPictures:
    """Writes heatmaps of one kind of load, and the counts they show.

    By default it writes the 1st, 2nd, 4th, 8th, ... load it is offered, and the last: about a dozen in a run of any
    length. The load of the first step may come before these; it is not counted.

    Args:
        tag: Prefix of the tags: `<tag>/experts` is the image, `<tag>/tokens_per_expert` the counts, as a float64
            tensor (L, E) in which -1 stands for an expert that a layer does not have.
        every_n_steps: Steps between pictures; None for growing intervals.
    """

    def __init__(self, tag: str, every_n_steps: int | None) -> None:
        """Start without any picture."""
        self._tag = tag
        self._every_n_steps = every_n_steps
        self._offered = 0
        self._first_step: int | None = None
        self._last_step: int | None = None
        self._waiting: tuple[int, dict[str, Tensor], str] | None = None

    def state_dict(self) -> dict[str, int | None]:
        """Return which pictures were written, so a resumed run does not begin again with short intervals."""
        return {"offered": self._offered, "first_step": self._first_step, "last_step": self._last_step}

    def load_state_dict(self, state: Mapping[str, int | None]) -> None:
        """Continue from what `state_dict` returned; an empty state begins."""
        self._offered = state.get("offered") or 0
        self._first_step, self._last_step = state.get("first_step"), state.get("last_step")

    def write_first(self, trainer: Trainer, step: int, loads: Mapping[str, LayerLoad]) -> None:
        """Write the load of the first step; see `offer`."""
        self._keep(trainer, step, loads)
        self.write_waiting(first_rank_loggers(trainer))
        self._first_step = step

    def offer(self, trainer: Trainer, step: int, loads: Mapping[str, LayerLoad]) -> bool:
        """Write a load if it is due, else keep it in case it is the last.

        Args:
            trainer: Whose loggers are written to.
            step: Where on the x-axis the load belongs.
            loads: The load of each layer.

        Returns:
            Whether it was due.
        """
        self._offered += 1
        self._keep(trainer, step, loads)
        return self._is_due(step) and self.write_waiting(first_rank_loggers(trainer))

    def write_waiting(self, loggers: Iterable[Logger]) -> bool:
        """Write the load that was offered last, if it was not due then; return whether there is one."""
        if self._waiting is None:
            return False
        (step, counts, title), self._waiting = self._waiting, None
        self._last_step = step
        if step == self._first_step:  # a window of the first step alone, which is drawn already
            return True
        loggers = list(loggers)
        log_image(loggers, f"{self._tag}/experts", load_heatmap(counts, title), step)
        for writer in tensorboard_writers(loggers):
            writer.add_tensor(f"{self._tag}/tokens_per_expert", _rectangle(counts), global_step=step)
        return True

    def _keep(self, trainer: Trainer, step: int, loads: Mapping[str, LayerLoad]) -> None:
        violation = fmean(load.max_violation_global for load in loads.values())
        dead = sum(load.dead_experts for load in loads.values())
        title = f"step {trainer.global_step}: MaxVio {violation:.2f}, {dead} dead"
        counts = {name: torch.tensor(load.tokens_per_expert) for name, load in loads.items()}
        self._waiting = (step, counts, title)

    def _is_due(self, step: int) -> bool:
        if self._every_n_steps is None:
            return self._offered.bit_count() == 1
        return self._last_step is None or step - self._last_step >= self._every_n_steps


def _rectangle(counts: Mapping[str, Tensor]) -> Tensor:
    """Return counts with -1 where a layer has no expert, in the widest type that event files take."""
    return stack_layers([count + 1 for count in counts.values()]).double() - 1
