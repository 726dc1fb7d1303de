"""What a step of `moe-train` spends outside of the model: on data, callbacks and logging, and in Lightning itself.

The small model on the text that this machine has, with the callbacks and loggers of the command, and no validation.
The model is its forward, backward, clipping and optimizer; the shares are of all process time of the training epoch.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from lightning.pytorch.profilers import Profiler

from benchmarks.row import Row
from moe_plugin.apps.launch.build import (
    build_callbacks,
    build_data,
    build_loggers,
    build_model,
    build_trainer,
)
from moe_plugin.apps.launch.compose import compose_jobs, without_hydra

INSIDE_THE_STEP = (
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)
AROUND_THE_STEP = ("on_train_batch_start", "on_train_batch_end")


class ProcessTime(Profiler):
    """Process seconds of everything that Lightning names."""

    def __init__(self) -> None:
        """Start without any time."""
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self._began: dict[str, float] = {}

    def start(self, action_name: str) -> None:
        """Note when an action begins."""
        self._began[action_name] = time.process_time()

    def stop(self, action_name: str) -> None:
        """Add the time of an action that ends."""
        if action_name in self._began:
            self.seconds[action_name] += time.process_time() - self._began.pop(action_name)

    def summary(self) -> str:
        """Return nothing to print."""
        return ""


def rows(steps: int = 60, batch: int = 8) -> Iterator[Row]:
    """Yield the shares of `steps` steps of `batch` sequences of 256 tokens."""
    seconds = profiled(steps, batch)
    total = seconds["run_training_epoch"]
    data = sum_of(seconds, "train_dataloader_next") + sum_of(seconds, "batch_to_device")
    nested = sum_of_callbacks(seconds, INSIDE_THE_STEP)
    callbacks = nested + sum_of_callbacks(seconds, AROUND_THE_STEP)
    model = sum_of(seconds, "optimizer_step") - nested
    milliseconds = 1e3 * total / steps
    parts = {
        "outside of the model": total - model,
        "waiting for data": data,
        "callbacks and logging": callbacks,
        "Lightning itself": total - model - data - callbacks,
    }
    for name, part in parts.items():
        yield Row(
            f"{name}, {steps} steps of small",
            100 * part / total,
            "the whole step",
            "%",
            milliseconds=milliseconds,
        )


def profiled(steps: int, batch: int) -> Mapping[str, float]:
    """Return the process seconds of a training, by Lightning's names."""
    words = [
        "model=small",
        f"trainer.max_steps={steps}",
        f"data.batch_size={batch}",
        "trainer.accelerator=cpu",
    ]
    words += [
        "trainer.limit_val_batches=0",
        "trainer.enable_progress_bar=false",
    ]
    (composed,) = compose_jobs(words, multirun=False)
    with tempfile.TemporaryDirectory() as folder:
        config = without_hydra(composed, Path(folder))
        profiler = ProcessTime()
        callbacks = [each for each in build_callbacks(config) if not hasattr(each, "best_model_path")]
        trainer = build_trainer(config, callbacks=callbacks, logger=build_loggers(config), profiler=profiler)
        trainer.fit(build_model(config), build_data(config))
    return profiler.seconds


def sum_of(seconds: Mapping[str, float], ending: str) -> float:
    """Return the seconds of the actions whose names end so."""
    return sum(value for name, value in seconds.items() if name.endswith(ending))


def sum_of_callbacks(seconds: Mapping[str, float], hooks: tuple[str, ...]) -> float:
    """Return the seconds of all callbacks in these hooks."""
    return sum(
        value for name, value in seconds.items() if name.startswith("[Callback]") and name.endswith(hooks)
    )
