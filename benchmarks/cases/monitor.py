"""What LoadMonitor costs at its defaults: its share of a training of the tiny model, and megabytes of events.

Time: process seconds inside the hooks of training and the looks at routers, over those of the rest of the fit, with
pictures. Size: the event file of 60 layers x 256 experts over 200 windows, which is 10,000 steps at the default of 50 a
window; the skew of the load changes from window to window, as a long run's does.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from benchmarks.models import random_tokens, tiny_model
from benchmarks.row import Row
from moe_plugin import LoadMonitor, LossFreeBalancing
from moe_plugin.callbacks.monitor.router_sample import RouterSample
from moe_plugin.experts import GroupedExperts, MoEBlock
from moe_plugin.routing import Router, Sigmoid

LAYERS, EXPERTS, WINDOWS = 60, 256, 200


def rows(steps: int = 300, batch: int = 16, size: int = 1) -> Iterator[Row]:
    """Yield the share of `steps` of `batch` sequences; `size=0` leaves the events of the large model out."""
    seconds, monitor_seconds = share_of_time(steps, batch)
    yield Row(
        f"monitoring, {steps} steps of tiny",
        100 * monitor_seconds / (seconds - monitor_seconds),
        "the rest of the fit",
        unit="%",
        goal=0.5,
        milliseconds=1e3 * seconds / steps,
    )
    if size:
        yield Row(
            f"events, {LAYERS} x {EXPERTS}, {WINDOWS} windows", megabytes(), "nothing", unit="MB", goal=10.0
        )


class Deep(lightning.LightningModule):
    """Many routers over hardly any computation."""

    def __init__(self) -> None:
        """Build the layers."""
        super().__init__()
        self.layers = torch.nn.ModuleList(
            MoEBlock(Router(8, EXPERTS, 8, score=Sigmoid()), GroupedExperts(EXPERTS, 8, 8))
            for _ in range(LAYERS)
        )

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Return a loss that moves the routers."""
        x = batch[0]
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD at a rate at which loads keep changing."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(model: lightning.LightningModule, data: Any, folder: str, monitor: LoadMonitor, steps: int) -> float:
    """Return the process seconds of a training."""
    trainer = lightning.Trainer(
        max_steps=steps,
        logger=TensorBoardLogger(folder, name="", version=""),
        callbacks=[LossFreeBalancing(), monitor],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    start = time.process_time()
    trainer.fit(model, data)
    return time.process_time() - start


def timed(function: Callable, total: list[float]) -> Callable:
    """Return the function, made to add its process seconds to a total."""

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            total[0] += time.process_time() - start

    return call


def share_of_time(steps: int, batch: int) -> tuple[float, float]:
    """Return the process seconds of a training of the tiny model, and of the monitor in it."""
    total = [0.0]
    monitor = LoadMonitor()
    for name in ("on_train_start", "on_train_batch_start", "on_train_batch_end", "on_train_end"):
        setattr(monitor, name, timed(getattr(monitor, name), total))
    RouterSample._look = timed(RouterSample._look, total)
    data = DataLoader([{"tokens": row} for row in random_tokens(steps * batch)], batch_size=batch)  # pyright: ignore
    with tempfile.TemporaryDirectory() as folder:
        return fit(tiny_model(), data, folder, monitor, steps), total[0]


def megabytes() -> float:
    """Return the size of the events of a long run of a large model."""
    torch.manual_seed(0)
    data = DataLoader(torch.utils.data.TensorDataset(torch.randn(WINDOWS * 64, 8) + 1), batch_size=64)
    with tempfile.TemporaryDirectory() as folder:
        fit(Deep(), data, folder, LoadMonitor(every_n_steps=1), WINDOWS)
        return sum(path.stat().st_size for path in Path(folder).rglob("events*")) / 1e6
