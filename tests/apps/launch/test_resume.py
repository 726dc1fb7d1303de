"""Tests of resuming: a run stopped at a step boundary and gone on with equals the uninterrupted one, bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_plugin.apps.launch.last_checkpoint import find_checkpoint
from moe_plugin.apps.launch.signals import STOPPED
from moe_plugin.apps.launch.train_job import train
from tests.apps.launch.small_job import NOISY, configuration

Words = tuple[str, ...]

EPOCH = "data.max_train_tokens=512"
"""Of four steps."""
CALIBRATED = (
    "callbacks.loss_free.calibration={_target_: moe_plugin.callbacks.calibration.Calibration, num_batches: 3}"
)
CASES = {
    "mid-epoch": ((), "SIGTERM@train:2"),
    "accumulation, inside a window": (("trainer.accumulate_grad_batches=2",), "SIGTERM@train:4"),
    "where a validation is due": (("trainer.val_check_interval=3",), "SIGTERM@train:2"),
    "inside a validation": (("trainer.val_check_interval=3",), "SIGTERM@val:1"),
    "inside a validation at an epoch's end, accumulation": (
        (EPOCH, "trainer.val_check_interval=4", "trainer.accumulate_grad_batches=2"),
        "SIGTERM@val:1",
    ),
    "last step of an epoch": ((EPOCH,), "SIGTERM@train:3"),
    "last step of an epoch where a validation is due, accumulation": (
        (EPOCH, "trainer.val_check_interval=2", "trainer.accumulate_grad_batches=2"),
        "SIGTERM@train:7",
    ),
    "second epoch": ((EPOCH,), "SIGTERM@train:4"),
    "among the batches of the calibration": ((CALIBRATED,), "SIGTERM@train:3"),
}


pytestmark = pytest.mark.usefixtures("workplace")


def run(folder: str, words: Words, stop: str = "", ranks: str = "0,1") -> int:
    """Runs a job in this process, from the folder's last checkpoint if there is one, and returns its exit code."""
    path = Path(folder).resolve()
    config = configuration(NOISY, *words, folder=path)
    config.ckpt_path = find_checkpoint("last", path)
    os.environ["STOP"], os.environ["RANKS"] = stop, ranks
    try:
        train(config)
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        del os.environ["STOP"], os.environ["RANKS"]
    return 0


def run_rank(rank: int, results: Any, *arguments: Any) -> None:
    results[rank] = run(*arguments)


def losses(folder: str, rank: int = 0) -> list[str]:
    return Path(folder, f"losses_{rank}.txt").read_text().splitlines()


def state(folder: str) -> dict[str, Any]:
    """Returns all that the checkpoint after the last step holds, but where the run is and how long it took."""
    saved = torch.load(Path(folder, "checkpoints", "last.ckpt"), weights_only=True)
    del saved["run_config"]
    saved["callbacks"].pop("TimeLimit", None)
    for value in saved["callbacks"].values():
        for key in [key for key in value if "path" in key or key == "best_k_models"]:
            del value[key]
    return saved


def assert_same(whole: Any, parts: Any, where: str = "") -> None:
    """Compares nested containers, tensors bit for bit."""
    if isinstance(whole, torch.Tensor):
        assert torch.equal(whole, parts), where
    elif isinstance(whole, dict):
        assert whole.keys() == parts.keys(), where
        for key in whole:
            assert_same(whole[key], parts[key], f"{where}.{key}")
    elif isinstance(whole, (list, tuple)):
        assert len(whole) == len(parts), where
        for index, pair in enumerate(zip(whole, parts, strict=True)):
            assert_same(*pair, f"{where}.{index}")
    else:
        assert whole == parts, where


class TestResume:
    @pytest.mark.parametrize(("words", "stop"), CASES.values(), ids=list(CASES))
    def test_stopped_and_resumed_run_equals_the_uninterrupted_one(self, words: Words, stop: str) -> None:
        assert run("whole", words) == 0
        assert run("parts", words, stop) == STOPPED
        assert len(losses("parts")) < len(losses("whole"))
        assert run("parts", words) == 0
        assert losses("parts") == losses("whole")
        assert_same(state("whole"), state("parts"))

    def test_run_stopped_by_time_goes_on_exactly(self) -> None:
        words = ("trainer.accumulate_grad_batches=2",)
        assert run("parts", ("trainer.max_time=00:00:00:01", "trainer.max_steps=1000000", *words)) == 0
        steps = torch.load("parts/checkpoints/last.ckpt", weights_only=True)["global_step"] + 3
        assert len(losses("parts")) == 2 * (steps - 3)
        assert run("parts", (f"trainer.max_steps={steps}", *words)) == 0
        assert run("whole", (f"trainer.max_steps={steps}", *words)) == 0
        assert losses("parts") == losses("whole")
        assert_same(state("whole"), state("parts"))

    @pytest.mark.parametrize(
        ("words", "stop", "ranks"),
        [
            ((), "SIGTERM@train:2", "0,1"),
            pytest.param(
                ("trainer.accumulate_grad_batches=2",), "SIGTERM@train:4", "1", marks=pytest.mark.slow
            ),
            (("trainer.val_check_interval=4", CALIBRATED), "SIGINT@val:1", "0"),
            pytest.param(
                ("trainer.val_check_interval=3", "strategy=fsdp"),
                "SIGTERM@val:1",
                "1",
                marks=pytest.mark.slow,
            ),
        ],
    )
    def test_two_ranks_stop_together_whichever_gets_the_signal_and_go_on_exactly(
        self, words: Words, stop: str, ranks: str, on_ranks: Any
    ) -> None:
        words = ("strategy=ddp", *words)
        assert on_ranks(2, run_rank, "whole", words) == {0: 0, 1: 0}
        assert on_ranks(2, run_rank, "parts", words, stop, ranks) == {0: STOPPED, 1: STOPPED}
        assert on_ranks(2, run_rank, "parts", words) == {0: 0, 1: 0}
        for rank in (0, 1):
            assert losses("parts", rank) == losses("whole", rank)
        assert losses("whole", 0) != losses("whole", 1)
        assert_same(state("whole"), state("parts"))

    def test_signal_before_training_ends_at_once_and_saves_nothing(self) -> None:
        words = ("trainer.num_sanity_val_steps=1",)
        assert run("early", words, "SIGTERM@val:0") == 128 + 15
        assert not Path("early/checkpoints/last.ckpt").exists()
