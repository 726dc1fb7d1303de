"""Silences messages of Lightning and torch that a user of this app need not act on; each line says why."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

# Lightning's tips, the devices it sees, the seed, each process's start, the stop reason, how it reads checkpoints
# (the user's own, with data and callback states), SLURM's requeueing (ours): the app itself shows what matters.
LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    # If both packages are installed, the one imported last writes for both.
    "pytorch_lightning.utilities.rank_zero",
    "lightning.fabric.utilities.distributed",
    "lightning.fabric.utilities.seed",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
    "lightning.pytorch.trainer.connectors.signal_connector",
)

WARNINGS = (
    # The corpus is in memory: workers would only copy it.
    r"The '\w+' does not have many workers",
    # Our loader is stateful: its length is not what Lightning logs by.
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    # The run's folder is new, or the user resumes into it on purpose.
    r"Checkpoint directory .* exists and is not empty",
    # A resumed run has its own folder, and picks its best checkpoint anew.
    r"The dirpath has changed from",
    # A CPU was asked for, or the strategy group takes the GPU by itself.
    r"GPU available but not used",
    # On a SLURM machine without srun, on purpose.
    r"The `srun` command is available on your system but is not used",
    # Lightning 2.6 with torch 2.13: its own use of a deprecated check.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # A run that continues in its folder keeps its earlier table next to the new one.
    r"Experiment logs directory .* exists and is not empty",
    # An evaluation needs none of the callbacks that only act in training.
    r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the messages above within its block, and no others."""
    with warnings.catch_warnings(), _level(LOGGERS, logging.WARNING):
        for message in WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        yield


@contextmanager
def _level(names: Sequence[str], minimum: int) -> Iterator[None]:
    """Let through only messages of at least a level within its block."""
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(minimum)
    try:
        yield
    finally:
        for name, value in before.items():
            logging.getLogger(name).setLevel(value)
