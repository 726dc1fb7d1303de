"""Training by `moe-train` under each strategy, saved and resumed, and a step that a gradient scaler skips.

A rehearsal trains a tiny model on the CPU, with gloo in place of NCCL.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.gpu.line import Figures, Line
from benchmarks.gpu.place import Place
from benchmarks.models import random_tokens, small_model
from moe_plugin import LossFreeBalancing
from moe_plugin.attach.balanced_model import find_balanced

ROOT = Path(__file__).parents[3]
STRATEGIES = ("single", "ddp", "fsdp", "fsdp1")
STEPS, RESUMED_STEPS = 20, 24
OVERFLOW_AT = 5
REHEARSED = {("single", "eager"), ("ddp", "compiled"), ("fsdp", "compiled")}
NOT_REHEARSED = "rehearsed in other lines; fsdp1 needs a GPU"
WORDS = (
    *("model=small", "trainer=bf16", "callbacks=checkpoint", "logger=csv", "trainer.log_every_n_steps=1"),
    *("data=files", f"data.source.root={ROOT}", "data.source.sources={code: 'moe_plugin/**/*.py'}"),
    *("data.max_val_tokens=65536", "trainer.val_check_interval=10", "trainer.enable_progress_bar=false"),
    # A schedule that does not depend on how many steps are to come.
    *("model.optimizer.warmup_steps=5", "model.optimizer.floor=1"),
)
DRY_WORDS = (
    *("trainer.accelerator=cpu", "experts=8", "experts.hidden_dim=16", "data.context_length=16"),
    *("model.dim=16", "model.num_layers=2", "model.num_heads=2", "data.batch_size=8"),
    *("data.val_batch_size=8", "data.max_val_tokens=512"),
)


def lines(place: Place) -> Iterator[Line]:
    """Yield each strategy, uncompiled and compiled, then the scaler."""
    for strategy, mode in product(STRATEGIES, ("eager", "compiled")):
        not_here = "" if (strategy, mode) in REHEARSED or not place.dry else NOT_REHEARSED
        measure = partial(trained, place, strategy, mode)
        yield Line(f"{strategy}, bf16-mixed, {mode}", measure, ("hydra", "omegaconf"), not_here)
    yield Line("single, 16-mixed, a skipped step", partial(skipped_step, place))


def trained(place: Place, strategy: str, mode: str) -> Figures:
    """Train, save, resume and train on.

    Args:
        place: Where.
        strategy: Its name in `conf/strategy`.
        mode: Eager or compiled.

    Raises:
        RuntimeError: The loss does not fall, or jumps where the run is resumed.
    """
    words = [*WORDS, *place.size((), DRY_WORDS), f"strategy={strategy}", "strategy.devices=1"]
    words += ["strategy.compile=inductor"] if mode == "compiled" else []
    with tempfile.TemporaryDirectory() as folder:
        words += [f"hydra.run.dir={folder}/run", f"data.cache={folder}/cache"]
        losses, summary = run(words, STEPS, folder)
        more, resumed = run([*words, "ckpt_path=last"], RESUMED_STEPS, folder)
    if not losses[-1] < losses[0]:
        raise RuntimeError(f"the loss must fall, got {losses}")
    if not abs(more[-1] - losses[-1]) < 0.5 * (losses[0] - losses[-1]):
        raise RuntimeError(f"the resumed run must continue at {losses[-1]}, got {more}")
    return {
        "first loss": losses[0],
        f"loss at {STEPS}": losses[-1],
        f"resumed, at {RESUMED_STEPS}": more[-1],
        "val loss": summary["val_loss"],
        "val loss, resumed": resumed["val_loss"],
    }


def run(words: Sequence[str], steps: int, folder: str) -> tuple[list[float], dict[str, Any]]:
    """Run `moe-train` in this process; return the losses of its steps and its summary.

    Args:
        words: The command line.
        steps: Where it ends.
        folder: Holds the run's folder.
    """
    from moe_plugin.apps.train import main

    main([*words, f"trainer.max_steps={steps}"])
    with Path(folder, "run", "csv", "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]
    return losses, json.loads(Path(folder, "run", "summary.json").read_text())


class OneOverflow(Callback):
    """Makes the gradients of one step infinite, and notes what changes in it.

    Attributes:
        changed: Parameters and biases that the step changed, by name.
        scales: The scaler's factor before and after.
    """

    def __init__(self) -> None:
        """Have seen nothing."""
        self.changed: list[str] | None = None
        self.scales: list[float] = []
        self._before: dict[str, Tensor] = {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep what the step must not change."""
        if batch_idx == OVERFLOW_AT:
            self._before = {name: value.clone() for name, value in _state(pl_module).items()}
            self.scales.append(_scale(trainer))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Multiply the gradient by infinity."""
        if trainer.fit_loop.batch_idx == OVERFLOW_AT:
            loss.register_hook(lambda gradient: gradient * torch.inf)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare."""
        if batch_idx == OVERFLOW_AT:
            now = _state(pl_module)
            self.changed = [name for name, value in self._before.items() if not torch.equal(now[name], value)]
            self.scales.append(_scale(trainer))


def _state(model: LightningModule) -> dict[str, Tensor]:
    balanced = find_balanced(model)
    assert balanced is not None
    biases = {f"bias of {name}": site.bias for name, site in balanced.items()}
    return {**dict(model.named_parameters()), **biases}


def _scale(trainer: Trainer) -> float:
    return trainer.precision_plugin.scaler.get_scale()  # pyright: ignore[reportAttributeAccessIssue]


def skipped_step(place: Place) -> Figures:
    """Train in fp16 with a gradient scaler, and let one step overflow.

    Raises:
        RuntimeError: The step changed something, or another was skipped.
    """
    steps, batch = place.size(STEPS, 7), place.size(32, 2)
    model = small_model(**place.size({}, {"dim": 16, "num_layers": 2, "num_heads": 2}))
    overflow = OneOverflow()
    scaler = torch.amp.GradScaler(place.device.type, init_scale=64.0)  # pyright: ignore[reportPrivateImportUsage]
    trainer = Trainer(
        max_steps=steps,
        accelerator=place.size("gpu", "cpu"),
        devices=1,
        plugins=[MixedPrecision("16-mixed", place.device.type, scaler)],
        callbacks=[LossFreeBalancing(), overflow],
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches: Any = [{"tokens": row} for row in random_tokens(steps * batch)]
    trainer.fit(model, DataLoader(batches, batch_size=batch))
    balanced = find_balanced(model)
    assert balanced is not None
    if overflow.changed != [] or balanced.step != steps - 1:
        raise RuntimeError(
            f"only step {OVERFLOW_AT} must be skipped, got {balanced.step} updates of {steps}; "
            f"it changed {overflow.changed}"
        )
    before, after = overflow.scales
    return {"scale before": before, "scale after": after, "updates": balanced.step, "batches": steps}
