"""Long runs: neither memory nor the logs grow with their steps."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from moe_plugin import LoadMonitor, LossFreeBalancing
from moe_plugin.attach.balance import balance_
from tests.hosts import Block, SoftmaxRouter

STEPS, WARM_UP = 20_000, 2_000
MEBIBYTE = 2**20

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*"),
]


def resident() -> float:
    """Returns this process's memory in MiB, without what the collector has yet to find."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MEBIBYTE


class Layer(nn.Module):
    """The smallest model there is to balance: one layer, so that many steps take little time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = Block(SoftmaxRouter(4, 2, 1), 4)

    def forward(self, x_TD):
        return self.block(x_TD)


class Project(pl.LightningModule):
    """Trains it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Layer()

    def training_step(self, batch, batch_idx):
        return self.model(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Tokens:
    """Batches of eight tokens, drawn anew in each step."""

    def __iter__(self):
        for _ in range(STEPS):
            yield torch.randn(8, 4)


class Scale(pl.Callback):
    """Weighs the process after the warm-up and at the end."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step in (WARM_UP, STEPS):
            self.seen.append(resident())


def test_twenty_thousand_steps_of_balance_hold_no_memory(figure):
    model = Layer()
    balanced = balance_(model)
    before = 0.0
    for step in range(1, STEPS + 1):
        model(torch.randn(8, 4))
        balanced.update()
        if step == WARM_UP:
            before = resident()
    grown = resident() - before
    figure(f"balance_, {STEPS:,} steps: memory grew by {grown:.1f} MiB, less than 5 are allowed")
    assert balanced.step == STEPS
    assert grown < 5


def test_twenty_thousand_steps_of_lightning_hold_no_memory_and_few_events(figure, tmp_path):
    scale = Scale()
    trainer = pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=TensorBoardLogger(tmp_path, name="", version=""),
        callbacks=[LossFreeBalancing(), LoadMonitor(), scale],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Project(), Tokens())
    before, after = scale.seen
    events = sum(path.stat().st_size for path in tmp_path.rglob("events*")) / MEBIBYTE
    figure(
        f"Lightning with LoadMonitor, {STEPS:,} steps: memory grew by {after - before:.1f} MiB, less than 5 are "
        f"allowed; {events:.1f} MiB of events, less than 10 are allowed"
    )
    assert after - before < 5
    assert 0 < events < 10
