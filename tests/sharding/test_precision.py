"""Low precision under strategies of several processes."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from moe_plugin import LossFreeBalancing, Sign
from moe_plugin.attach.balanced_model import find_balanced
from tests.hosts import Host, OwningRouter
from tests.sharding.ranks import loader, trainer
from tests.sharding.test_shard import HostProject

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),
]
KINDS = ("ddp", "fsdp")


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 32, (4, 8), generator=generator) for _ in range(6)]


def owning_host():
    return Host(OwningRouter)


class TestBf16True:
    def test_bias_stays_fp32_and_moves_by_less_than_bf16_could(self, on_ranks):
        results = on_ranks(2, fit_bf16)
        assert results[0] == results[1]
        for parameters, biases in results[0]:
            assert parameters == {torch.bfloat16}
            assert all(dtype == torch.float32 and 0 < largest < 1e-3 for dtype, largest in biases)


def fit_bf16(rank, results):
    results[rank] = [bf16_run(rank, kind, make) for kind in KINDS for make in (Host, owning_host)]


def bf16_run(rank, kind, make):
    project = HostProject(make)
    run = trainer(kind, max_epochs=1, precision="bf16-true", callbacks=[LossFreeBalancing(Sign(rate=1e-4))])
    run.fit(project, loader(batches(), rank, 2))
    biases = [(site.bias.dtype, site.bias.abs().max().item()) for site in find_balanced(project).values()]
    return {parameter.dtype for parameter in project.parameters()}, biases


class Overflowing(HostProject):
    """Every second gradient overflows, in one parameter and on one rank only."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx % 2 and self.global_rank == self.trainer.world_size - 1:
            loss = loss + self.model.head.bias[0] * torch.inf
        return loss


class TestSkippedFp16Step:
    def test_moves_nothing_on_any_rank(self, on_ranks):
        results = on_ranks(2, fit_overflowing)
        assert results[0] == results[1]
        for steps, moved_at in results[0]:
            assert steps == 3
            assert moved_at == [0, 2, 4]


def fit_overflowing(rank, results):
    results[rank] = [overflowing_run(rank, kind) for kind in KINDS]


def overflowing_run(rank, kind):
    project, moved = Overflowing(), []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    callback = LossFreeBalancing(Sign(rate=0.01))
    before = None

    def look(trainer, module, outputs, batch, batch_idx):
        nonlocal before
        biases = [site.bias.tolist() for site in find_balanced(project).values()]
        if biases != (before or [[0.0] * 4] * 2):
            moved.append(batch_idx)
        before = biases

    from lightning.pytorch.callbacks import LambdaCallback

    run = trainer(
        kind, max_epochs=1, plugins=[plugin], callbacks=[callback, LambdaCallback(on_train_batch_end=look)]
    )
    run.fit(project, loader(batches(), rank, 2))
    return find_balanced(project).step, moved
