"""Counts the tokens and seconds of training, validation left out."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn


class Throughput(Callback):
    """Counts predicted tokens over all ranks, and seconds between training's start and end less those of validations.

    Attributes:
        tokens: Tokens trained on, over all ranks.
        seconds: Seconds of training.
    """

    def __init__(self) -> None:
        """Start at 0."""
        self.tokens = 0
        self.seconds = 0.0
        self._since: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Training tokens per training second; 0 before any."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a micro-batch: each sequence of S+1 tokens has S to predict."""
        # Ranks that split the computation of the same tokens count once.
        replicas = (trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"]
        self.tokens += batch["tokens"][:, 1:].numel() * replicas

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock during a validation in the middle of training."""
        self._stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._start()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._stop()

    def _start(self) -> None:
        self._since = time.perf_counter()

    def _stop(self) -> None:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
        self._since = None
