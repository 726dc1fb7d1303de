"""What balancing and monitoring do in a training step, counted: times are in benchmarks/, and differ by machine."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from moe_plugin import LoadMonitor, LossFreeBalancing
from moe_plugin.apps.models import LanguageModel
from moe_plugin.experts import ExpertShape
from tests.apps.models.small_models import language_model, token_batch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*"),
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
]
STEPS, LOG_EVERY = 12, 4
LOGGED = [step for step in range(1, STEPS) if (step + 1) % LOG_EVERY == 0]
"""Steps from zero, without the first: it checks that balancing has an effect."""

PYTHON_WAITS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__")
KERNEL_WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")


class Calls(TorchFunctionMode):
    """Counts calls that wait for a device: those that bring a tensor's values to Python, and those of unknown size."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(
        self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        self.counts["waits"] += getattr(func, "__name__", "") in PYTHON_WAITS
        return func(*args, **(kwargs or {}))


class Kernels(TorchDispatchMode):
    """Counts operations that reach a kernel, waits for a device among them, and collectives."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.counts["collectives"] += func.namespace == "c10d"
        self.counts["waits"] += name in KERNEL_WAITS
        self.counts["kernels"] += not func.is_view
        return func(*args, **(kwargs or {}))


class StepCosts:
    """Counts what happens in each training step, all callbacks' hooks included."""

    def __init__(self) -> None:
        self.steps: list[Counter[str]] = []
        self._modes: list[Any] = []

    def enter(self) -> None:
        counts: Counter[str] = Counter()
        self.steps.append(counts)
        self._modes = [Calls(counts), Kernels(counts)]
        for mode in self._modes:
            mode.__enter__()

    def leave(self) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(None, None, None)


class First(Callback):
    """Counts from here on: the first callback."""

    def __init__(self, costs: StepCosts) -> None:
        self.costs = costs

    def on_train_batch_start(self, *_: Any) -> None:
        self.costs.enter()


class Last(First):
    """Counts until here: the last callback."""

    def on_train_batch_start(self, *_: Any) -> None:
        pass

    def on_train_batch_end(self, *_: Any) -> None:
        self.costs.leave()


def counted(
    folder: Path,
    callbacks: Sequence[Callback],
    num_layers: int = 2,
    num_experts: int = 4,
    **settings: Any,
) -> StepCosts:
    """What each of the steps of a fit did."""
    torch.manual_seed(0)
    costs = StepCosts()
    model: LanguageModel = language_model(
        num_layers=num_layers, experts=ExpertShape(num_experts=num_experts, top_k=2, hidden_dim=8)
    )
    batches: Any = [{"tokens": tokens} for tokens in token_batch(2 * STEPS)["tokens"]]
    trainer = Trainer(
        max_steps=STEPS,
        log_every_n_steps=LOG_EVERY,
        logger=TensorBoardLogger(folder),
        callbacks=[First(costs), *callbacks, Last(costs)],
        accelerator="cpu",
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(model, DataLoader(batches, batch_size=2))
    assert len(costs.steps) == STEPS
    return costs


class TestWaits:
    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_no_step_between_logged_ones_waits_for_the_device(self, tmp_path: Path, precision: str) -> None:
        costs = counted(tmp_path, [LossFreeBalancing(), LoadMonitor()], precision=precision)
        waits = [counts["waits"] for counts in costs.steps]
        assert [waits[step] for step in range(1, STEPS) if step not in LOGGED] == [0] * 8
        assert all(waits[step] > 0 for step in LOGGED), "the counter must see what logging does"


def kernels(folder: Path, callbacks: Sequence[Callback], **sizes: int) -> int:
    """Kernels of a step between logged ones."""
    return counted(folder, callbacks, **sizes).steps[5]["kernels"]


def added_kernels(folder: Path, **sizes: int) -> int:
    """Kernels that balancing adds to a step between logged ones."""
    with_it, without = (
        counted(folder, callbacks, **sizes).steps[5]["kernels"] for callbacks in ([LossFreeBalancing()], [])
    )
    return with_it - without


class TestKernels:
    def test_balancing_adds_a_constant_number_per_layer_and_none_per_expert(self, tmp_path: Path) -> None:
        added = added_kernels(tmp_path)
        per_layer = (added_kernels(tmp_path, num_layers=4) - added) / 2
        assert per_layer <= 1  # the copy of what was selected
        assert added - 2 * per_layer <= 51  # whatever the number of layers
        assert added_kernels(tmp_path, num_experts=16) == added


def fit_on_rank(rank: int, results: Any, folder: Path) -> None:
    warnings.simplefilter("ignore")
    results[rank] = [
        [counts["collectives"] for counts in counted(folder, each, strategy="ddp", devices=2).steps]
        for each in ([], [LossFreeBalancing(), LoadMonitor()])
    ]


class TestCollectives:
    def test_balancing_adds_one_to_a_step_and_logging_none_between_logged_ones(
        self, tmp_path: Path, on_ranks: Callable
    ) -> None:
        plain, balanced = on_ranks(2, fit_on_rank, tmp_path)[0]
        quiet = [step for step in range(2, STEPS) if step not in LOGGED]
        assert {balanced[step] - plain[step] for step in quiet} == {1}
        assert len({plain[step] for step in quiet}) == 1
        assert all(plain[step] > plain[quiet[0]] for step in LOGGED), "the counter must see what logging does"
