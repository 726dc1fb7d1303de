from __future__ import annotations

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from moe_plugin import LoadMonitor, LossFreeBalancing, balance_
from moe_plugin.attach.balanced_model import find_balanced
from moe_plugin.balancing.rules import Sign
from moe_plugin.errors import BalanceWarning, CheckpointError
from tests.callbacks.test_loss_free import RATE, Project, ValidatedProject, biases, fit, loader, trainer
from tests.callbacks.test_loss_free import pytestmark as quiet
from tests.hosts import OwningRouter

pytestmark = [*quiet, pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no.*")]


def balancing():
    return LossFreeBalancing(Sign(rate=RATE))


def trained(path, project=ValidatedProject, callback=None, *, weights_only=True):
    """The module and its checkpoint, written by Lightning's own callback."""
    module = project()
    saver = ModelCheckpoint(path, filename="saved", save_weights_only=weights_only)
    fit(module, path, callback or balancing(), callbacks=[saver], enable_checkpointing=True)
    return module, path / "saved.ckpt"


def outputs(module):
    with torch.no_grad():
        return module.eval().model(next(iter(loader())))


class TestWeightsOnly:
    def test_validation_selects_as_after_training(self, tmp_path):
        module, path = trained(tmp_path)
        assert "callbacks" not in torch.load(path, weights_only=True)
        expected = trainer(balancing(), tmp_path).validate(module, loader(), verbose=False)
        other = trainer(balancing(), tmp_path)
        assert other.validate(ValidatedProject(), loader(), ckpt_path=path, verbose=False) == expected

    def test_plain_inference_loads_the_biases_from_it(self, tmp_path):
        module, path = trained(tmp_path)
        loaded = Project.load_from_checkpoint(path)
        assert not torch.equal(outputs(loaded), outputs(module))
        balance_(loaded, rule=None).load(path)
        assert torch.equal(outputs(loaded), outputs(module))

    def test_sharded_checkpoint_is_read_from_its_meta_file(self, tmp_path):
        module, path = trained(tmp_path)
        path.rename(tmp_path / "meta.pt")
        loaded = Project()
        balance_(loaded).load(tmp_path)
        assert biases(loaded) == biases(module)

    def test_module_that_balances_itself_is_restored_by_lightning(self, tmp_path):
        module, path = trained(tmp_path)

        class Balanced(Project):
            def __init__(self):
                super().__init__()
                balance_(self, Sign(rate=RATE))

        assert biases(Balanced.load_from_checkpoint(path)) == biases(module)

    def test_resaved_biases_stay_in_the_checkpoint(self, tmp_path):
        module, path = trained(tmp_path)
        loaded = ValidatedProject()
        balance_(loaded, rule=None).load(path)
        again = trainer(LoadMonitor(), tmp_path)
        again.validate(loaded, loader(), verbose=False)
        again.save_checkpoint(tmp_path / "again.ckpt", weights_only=True)
        other = Project()
        balance_(other).load(tmp_path / "again.ckpt")
        assert biases(other) == biases(module)


class TestMissingBiases:
    def test_fit_and_validation_warn(self, tmp_path):
        _, path = trained(tmp_path, callback=pl.Callback(), weights_only=False)
        run = trainer(balancing(), tmp_path, max_epochs=2)
        with pytest.warns(
            BalanceWarning, match="The checkpoint has no biases, so the 2 that the model does not own"
        ):
            run.fit(ValidatedProject(), loader(), ckpt_path=path)
        with pytest.warns(BalanceWarning, match="The checkpoint has no biases"):
            trainer(balancing(), tmp_path).validate(
                ValidatedProject(), loader(), ckpt_path=path, verbose=False
            )

    def test_loading_them_by_hand_is_an_error(self, tmp_path):
        path = tmp_path / "saved.ckpt"
        torch.save({"state_dict": Project().state_dict()}, path)
        with pytest.raises(
            CheckpointError, match="has no biases: it was written by a module that was not balanced"
        ):
            balance_(Project()).load(path)

    def test_model_with_a_bias_of_its_own_needs_none(self, tmp_path):
        def owning():
            return Project(OwningRouter)

        _, path = trained(tmp_path, owning, pl.Callback(), weights_only=False)
        resumed = owning()
        trainer(balancing(), tmp_path, max_epochs=2).fit(resumed, loader(), ckpt_path=path)
        assert find_balanced(resumed).step == 4

    def test_watched_model_needs_none_and_adds_none(self, tmp_path):
        _, path = trained(tmp_path, callback=LoadMonitor(), weights_only=False)
        assert "moe_plugin" not in torch.load(path, weights_only=True)
        trainer(LoadMonitor(), tmp_path).validate(ValidatedProject(), loader(), ckpt_path=path, verbose=False)


class TestWatched:
    def test_it_selects_by_the_biases_of_the_checkpoint(self, tmp_path):
        module, path = trained(tmp_path)
        watched = ValidatedProject()
        trainer(LoadMonitor(), tmp_path).validate(watched, loader(), ckpt_path=path, verbose=False)
        assert biases(watched) == biases(module)

    def test_biases_of_other_sites_are_named_and_left(self, tmp_path):
        _, path = trained(tmp_path, callback=LossFreeBalancing(Sign(rate=RATE), sites="*.0.router"))
        watched = ValidatedProject()
        with pytest.warns(
            BalanceWarning, match="biases of the checkpoint are not used. The checkpoint balances"
        ):
            trainer(LoadMonitor(), tmp_path).validate(watched, loader(), ckpt_path=path, verbose=False)


class TestModule:
    def test_remove_restores_its_class(self):
        module = Project()
        balance_(module).remove()
        assert type(module) is Project

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
    def test_copies_carry_their_own_biases(self, copied):
        module = Project()
        balance_(module)["model.layers.0.router"].bias.fill_(1)
        other = copied(module)
        module.model.layers[0].router.moe_plugin_bias.fill_(2)
        checkpoint = {}
        other.on_save_checkpoint(checkpoint)
        assert checkpoint["moe_plugin"]["sites"]["model.layers.0.router"]["bias"].tolist() == [1] * 4

    def test_hooks_of_the_project_still_run(self, tmp_path):
        class Hooked(Project):
            def on_save_checkpoint(self, checkpoint):
                checkpoint["mine"] = 1

            def on_load_checkpoint(self, checkpoint):
                self.seen = checkpoint["mine"]

        _, path = trained(tmp_path, Hooked)
        module = Hooked()
        balance_(module)
        module.on_load_checkpoint(torch.load(path, weights_only=True))
        assert module.seen == 1
