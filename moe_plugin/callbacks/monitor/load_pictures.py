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

    By default it writes the 1st, 2nd, 4th, 8th, ... picture it is offered, and the last: about ten in a run of
    any length, which is what TensorBoard keeps of a tag.

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
        self._last_step: int | None = None
        self._waiting: tuple[int, dict[str, Tensor], str] | None = None

    def offer(self, trainer: Trainer, step: int, loads: Mapping[str, LayerLoad]) -> bool:
        """Write a picture if one is due, and say so, else keep it in case it is the last."""
        self._offered += 1
        violation = fmean(load.max_violation_global for load in loads.values())
        dead = sum(load.dead_experts for load in loads.values())
        title = f"load over ideal load, step {trainer.global_step}: MaxVio {violation:.2f}, {dead} dead"
        self._waiting = (step, counts_of(loads), title)
        return self._is_due(step) and self.write_waiting(first_rank_loggers(trainer))

    def write_waiting(self, loggers: Iterable[Logger]) -> bool:
        """Write the picture offered last, unless it is written already; says whether it was."""
        if self._waiting is None:
            return False
        (step, counts, title), self._waiting = self._waiting, None
        self._last_step = step
        loggers = list(loggers)
        log_image(loggers, f"{self._tag}/experts", load_heatmap(counts, title), step)
        for writer in tensorboard_writers(loggers):
            writer.add_tensor(f"{self._tag}/tokens_per_expert", _rectangle(counts), global_step=step)
        return True

    def _is_due(self, step: int) -> bool:
        if self._every_n_steps is None:
            return self._offered.bit_count() == 1
        return self._last_step is None or step - self._last_step >= self._every_n_steps


def counts_of(loads: Mapping[str, LayerLoad]) -> dict[str, Tensor]:
    """Return the tokens per expert of each layer as int64 tensors."""
    return {name: torch.tensor(load.tokens_per_expert) for name, load in loads.items()}


def _rectangle(counts: Mapping[str, Tensor]) -> Tensor:
    """Return counts with -1 where a layer has no expert, in the widest type that event files take."""
    return stack_layers([count + 1 for count in counts.values()]).double() - 1
