"""A job of a second: made-up text, a very small model whose losses are random in every way and written down."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn import functional

from moe_plugin.apps.launch.compose import compose_jobs, quote_option, without_hydra
from moe_plugin.apps.models import LanguageModel
from moe_plugin.errors import ConfigError

# Nothing that depends on how many steps are to come, so that runs of different lengths can be compared.
WORDS = [
    *("experts=8", "experts.hidden_dim=16", "model.dim=16", "model.num_layers=1", "model.num_heads=2"),
    *("data=files", "data.source.sources={letters: 'texts/a*.txt', digits: 'texts/d*.txt'}"),
    *("data.context_length=16", "data.batch_size=8", "data.val_batch_size=8", "data.max_val_tokens=512"),
    *("model.optimizer.warmup_steps=0", "model.optimizer.floor=1"),
    *("trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "trainer.max_steps=6"),
    *("logger=csv", "callbacks=checkpoint", "balancing=loss_free", "name=small"),
]
NOISY = "model._target_=tests.apps.launch.small_job.NoisyModel"


def write_texts(folder: Path) -> None:
    """Writes eight texts of each of two domains into ``texts/``."""
    (folder / "texts").mkdir()
    for i in range(8):
        letters = "".join(chr(97 + (i * 7 + j * j) % 26) for j in range(600))
        (folder / "texts" / f"a{i}.txt").write_text(letters)
        (folder / "texts" / f"d{i}.txt").write_text(" ".join(str(i + j * 37) for j in range(200)))


def configuration(*words: str, folder: Path) -> DictConfig:
    """Returns a job's resolved configuration."""
    (config,) = compose_jobs([quote_option(word) for word in (*WORDS, *words)], multirun=False)
    folder.mkdir(parents=True, exist_ok=True)
    return without_hydra(OmegaConf.create(OmegaConf.to_container(config)), folder)


class NoisyModel(LanguageModel):
    """Draws from torch's, numpy's and Python's generators for each loss, and writes the losses down by rank.

    The variable STOP says which signal comes when: ``SIGTERM@train:3`` in the micro-batch with that index,
    ``SIGTERM@val:1`` in that validation batch; RANKS, to which ranks (all without it); ``parent`` for the parent.
    """

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self._signal("train", self.trainer.fit_loop.epoch_loop.total_batch_idx)
        loss = super().training_step(batch, batch_idx)
        noise = functional.dropout(torch.ones(4), 0.5).sum() + np.random.rand() + random.random()
        loss = loss * (1 + 0.1 * noise)
        folder = Path(self.trainer.loggers[0].save_dir)
        with (folder / f"losses_{self.trainer.global_rank}.txt").open("a") as file:
            file.write(f"{self.trainer.global_step} {batch_idx} {loss.item().hex()}\n")
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._signal("val", batch_idx)
        super().validation_step(batch, batch_idx)

    def on_fit_end(self) -> None:
        """Writes down what this rank was configured as and what it came to."""
        whole = (getattr(value, "full_tensor", lambda v=value: v)() for value in self.state_dict().values())
        weights = b"".join(value.numpy().tobytes() for value in whole)
        seen = {
            "seed": int(os.environ["PL_GLOBAL_SEED"]),
            "learning_rate": self.trainer.optimizers[0].param_groups[0]["lr"],
            "ranks": self.trainer.world_size,
            "weights": hashlib.sha256(weights).hexdigest(),
        }
        folder = Path(self.trainer.loggers[0].save_dir)
        (folder / f"seen_{self.trainer.global_rank}.json").write_text(json.dumps(seen))

    def _signal(self, phase: str, batch_idx: int) -> None:
        name, _, when = os.environ.get("STOP", "").partition("@")
        ranks = os.environ.get("RANKS", "0,1")
        if when != f"{phase}:{batch_idx}":
            return
        if ranks == "parent" and self.trainer.is_global_zero:
            os.kill(os.getppid(), getattr(signal, name))
        elif str(self.trainer.global_rank) in ranks:
            os.kill(os.getpid(), getattr(signal, name))


class RefusingData(LightningDataModule):
    """Finds the user's fault only when the run has begun."""

    def __init__(self, **settings: object) -> None:
        super().__init__()

    def train_dataloader(self) -> list[int]:
        return []

    def val_dataloader(self) -> list[int]:
        return []

    def setup(self, stage: str | None = None) -> None:
        raise ConfigError("data", "must be given")


class FailingData(LightningDataModule):
    """Fails with the program's fault, not the user's."""

    def __init__(self, **settings: object) -> None:
        super().__init__()

    def train_dataloader(self) -> list[int]:
        return []

    def val_dataloader(self) -> list[int]:
        return []

    def setup(self, stage: str | None = None) -> None:
        raise RuntimeError("out of memory")
