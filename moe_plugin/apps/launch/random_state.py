"""Keeps the state of the random number generators of every rank in checkpoints; Lightning keeps none."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

KEY = "random_states"


class RandomState(Callback):
    """Saves torch's, numpy's and Python's generators, and lets a resumed run continue from there.

    With another number of ranks nothing is restored: each then starts from its seed.
    """

    def __init__(self) -> None:
        """Start with nothing to restore."""
        self._saved: list[dict[str, Any]] = []

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the states of all ranks, which all take part in saving."""
        states: list[Any] = [None] * trainer.world_size
        if trainer.world_size == 1:
            states = [random_state()]
        else:
            dist.all_gather_object(states, random_state())
        checkpoint[KEY] = states

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the states until the first batch or validation: what is set up before it may draw numbers too."""
        self._saved = checkpoint.get(KEY, [])

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Restore this rank's state once."""
        self._restore_(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore it before a validation that comes before the first batch."""
        if not trainer.sanity_checking:
            self._restore_(trainer)

    def _restore_(self, trainer: Trainer) -> None:
        if len(self._saved) == trainer.world_size:
            _set_random_state_(self._saved[trainer.global_rank])
        self._saved = []


def random_state() -> dict[str, Any]:
    """Return the state of this process's generators, in what ``torch.load(weights_only=True)`` reads."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (name, keys.tolist(), *rest),  # pyright: ignore[reportAttributeAccessIssue]
        "python": random.getstate(),
    }


def _set_random_state_(state: dict[str, Any]) -> None:
    """Put this process's generators into a state of `random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
