"""The real DeepSpeed, on the CPU and in a process of its own."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy

from tests.callbacks.test_loss_free import (
    Project,
    SkippingProject,
    biases,
    find_balanced,
    fit,
    loader,
    slow_biases,
)

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="needs DeepSpeed: DS_BUILD_OPS=0 pip install deepspeed",
    ),
    pytest.mark.filterwarnings("ignore"),  # DeepSpeed's own, of many kinds
]


class OnCpu(DeepSpeedStrategy):
    """Lightning's strategy without its check that there are GPUs."""

    root_device = torch.device("cpu", 0)  # pyright: ignore[reportAssignmentType]

    def setup_environment(self):
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self):
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class TwoGroups(Project):
    def configure_optimizers(self):
        routers = [p for name, p in self.named_parameters() if "router" in name]
        others = [p for name, p in self.named_parameters() if "router" not in name]
        return torch.optim.Adam([{"params": routers}, {"params": others}], lr=0.0)


class Overflowing(SkippingProject, TwoGroups):
    """Every second gradient overflows."""


def fit_on_cpu(module, tmp_path, strategy, **settings):
    # It would be compiled, to save copies between processes.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    return fit(module, tmp_path, strategy=strategy, devices=1, use_distributed_sampler=False, **settings)


def fit_rank(rank, results, tmp_path, stage, accumulate):
    module, strategy = TwoGroups(), OnCpu(stage=stage, process_group_backend="gloo")
    run = fit_on_cpu(module, tmp_path, strategy, accumulate_grad_batches=accumulate)
    kinds = [kind.__name__ for kind in type(run.optimizers[0]).__mro__]
    results[rank] = (find_balanced(module).step, biases(module), "DeepSpeedOptimizer" in kinds)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_step_updates_once(stage, accumulate, tmp_path, on_ranks, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    batches = list(loader())
    steps = [batches[start : start + accumulate] for start in range(0, 4, accumulate)]
    results = on_ranks(1, fit_rank, str(tmp_path), stage, accumulate)
    assert results[0] == (len(steps), slow_biases(Project, steps), True)


def fit_overflowing(rank, results, tmp_path):
    module, strategy = Overflowing(), OnCpu(stage=2, process_group_backend="gloo")
    assert isinstance(strategy.config, dict)
    strategy.config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    fit_on_cpu(module, tmp_path, strategy, precision="bf16-mixed")
    balanced = find_balanced(module)
    results[rank] = (balanced.step, [counts.sum().item() for counts in balanced.record.counts.values()])


def test_overflow_discards_the_counts_of_its_step(tmp_path, on_ranks, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    tokens_times_k = next(iter(loader())).numel() * 2
    assert on_ranks(1, fit_overflowing, str(tmp_path))[0] == (2, [tokens_times_k] * 2)
