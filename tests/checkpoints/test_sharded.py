from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from moe_plugin import LossFreeBalancing, Sign
from moe_plugin.apps.launch.checkpoint_fits import check_checkpoint_fits
from moe_plugin.attach.balanced_model import find_balanced
from moe_plugin.checkpoints import VerifiedCheckpointIO, VerifiedShards
from moe_plugin.checkpoints.sharded import shapes_in
from moe_plugin.errors import CheckpointError
from moe_plugin.experts import ExpertShape
from moe_plugin.routing import Router, Sigmoid
from tests.apps.models.small_models import language_model
from tests.hosts import Host, OwningRouter
from tests.sharding.ranks import loader, trainer
from tests.sharding.test_shard import HostProject

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`.*"),
]
KINDS = {
    "single": ("single", False),
    "ddp": ("ddp", False),
    "fsdp": ("fsdp", False),
    "sharded": ("fsdp", True),
}
MAKES = {"own": Host, "owned": partial(Host, OwningRouter)}
STEPS = 4


class Sharding(VerifiedShards, ModelParallelStrategy):
    pass


def batches(epochs=1):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 32, (4, 8), generator=generator) for _ in range(STEPS)] * epochs


def runner(kind, callbacks, **settings):
    strategy, sharded = KINDS[kind]
    balancing = LossFreeBalancing(Sign(rate=0.01))
    if strategy == "fsdp":
        settings["strategy"] = Sharding(dist.get_world_size(), 1, save_distributed_checkpoint=sharded)
    # The strategies that know only files read folders with the plugin.
    plugins = [VerifiedCheckpointIO()]
    return trainer(strategy, plugins=plugins, callbacks=[balancing, *callbacks], **settings)


def save(rank, results, folder, make, kinds):
    for kind in kinds:
        project = HostProject(MAKES[make])
        saver = ModelCheckpoint(folder, every_n_train_steps=STEPS, save_top_k=-1, filename=f"{make}-{kind}")
        run = runner(kind, [saver], max_epochs=1, enable_checkpointing=True)
        run.fit(project, loader(batches(), rank, run.world_size))


def resume(rank, results, folder, make, kinds, saved):
    found = {}
    for kind in kinds:
        for origin in saved:
            project, seen = HostProject(MAKES[make]), {}
            look = LambdaCallback(on_train_start=lambda _, module, seen=seen: seen.update(state_of(module)))
            run = runner(kind, [look], max_epochs=2)
            path = str(Path(folder, f"{make}-{origin}.ckpt"))
            run.fit(project, loader(batches(), rank, run.world_size), ckpt_path=path)
            found[kind, origin] = seen, state_of(project), project.losses
    results[rank] = found


def state_of(module):
    balanced = find_balanced(module)
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in module.named_parameters()}
    biases = [site.bias.tolist() for site in balanced.values()]
    return {
        "step": balanced.step,
        "biases": biases,
        "weights": {n: p.detach().clone() for n, p in whole.items()},
    }


class TestAcrossStrategies:
    @pytest.mark.parametrize("make", MAKES)
    def test_any_loads_any_and_goes_on_alike(self, make, on_ranks, tmp_path):
        save(0, {}, tmp_path, make, ["single"])
        on_ranks(2, save, str(tmp_path), make, ["ddp", "fsdp", "sharded"])
        assert (tmp_path / f"{make}-sharded.ckpt").is_dir()
        results = {}
        resume(0, results, str(tmp_path), make, ["single"], KINDS)
        results[1] = on_ranks(2, resume, str(tmp_path), make, ["ddp", "fsdp"], KINDS)[0]
        straight = HostProject(MAKES[make])
        runner("single", [], max_epochs=2).fit(straight, loader(batches()))
        reference = results[0]["single", "single"][0]
        assert reference["step"] == STEPS
        for found in (results[0], results[1]):
            for (kind, origin), (loaded, ended, _) in found.items():
                assert loaded["step"] == STEPS, (kind, origin)
                assert loaded["biases"] == reference["biases"], (kind, origin)
                assert ended["biases"] == state_of(straight)["biases"], (kind, origin)
                for name, weight in state_of(straight)["weights"].items():
                    torch.testing.assert_close(ended["weights"][name], weight, atol=2e-5, rtol=1e-4)


class TestShapesIn:
    def test_file_that_is_no_checkpoint_is_named(self, tmp_path):
        path = tmp_path / "notes.txt"
        path.write_text("not a checkpoint")
        with pytest.raises(CheckpointError, match=r"notes\.txt' is damaged or no checkpoint"):
            shapes_in(path)

    def test_file_of_another_form_is_named(self, tmp_path):
        torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match=r"must be a checkpoint of Lightning, got .*other\.pt"):
            shapes_in(tmp_path / "other.pt")


class TestCheckpointExperts:
    def test_both_numbers_are_named_for_each_layer(self, tmp_path):
        model, path = language_model(), tmp_path / "last.ckpt"
        torch.save({"state_dict": model.state_dict()}, path)
        check_checkpoint_fits(model, path)
        router = partial(Router, score=Sigmoid())
        other = language_model(router=router, num_dense=1, experts=ExpertShape(8, 2, 8))
        with pytest.raises(
            CheckpointError, match=r"layers\.1\.feed_forward: 4 in the checkpoint, 8 in the model"
        ):
            check_checkpoint_fits(other, path)
