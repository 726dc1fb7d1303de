from __future__ import annotations

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from moe_plugin import LossFreeBalancing, balance_
from moe_plugin.attach.balanced_model import find_balanced
from moe_plugin.balancing.rules import Sign
from moe_plugin.callbacks.calibration import KEY, Calibration
from moe_plugin.errors import ConfigError
from moe_plugin.metrics import max_violation
from tests.hosts import Host, OwningRouter

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*"),
    pytest.mark.filterwarnings(
        "ignore:.*The number of training batches .* is smaller than the logging interval.*"
    ),
]


class Project(pl.LightningModule):
    """Logs what it trains on; its router never moves, and a rate of zero leaves it unbalanced."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = Host(OwningRouter, dim=16, num_experts=8)
        self.seen: list[tuple[bool, bool]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.training, torch.is_grad_enabled()))
        loss = self.model(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Unindexed(Project):
    def training_step(self, batch):
        return super().training_step(batch, 0)


def loader(batches=8):
    x = torch.randint(0, 32, (batches * 4, 16), generator=torch.Generator().manual_seed(1))
    return DataLoader(x, batch_size=4)


def fit(module, tmp_path, calibration, callbacks=(), **settings):
    callback = LossFreeBalancing(Sign(rate=0.0), calibration=calibration)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    defaults = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": bool(callbacks),
    }
    trainer = pl.Trainer(callbacks=[callback, *callbacks], **(defaults | quiet | settings))
    trainer.fit(module, loader())
    return trainer


def violations(module):
    """MaxVio of each site over the training data, by a plain pass."""
    balanced = find_balanced(module)
    for site in balanced.values():
        site.eval_counts.zero_()
    module.eval()
    with torch.no_grad():
        for x in loader():
            module.model(x)
    return [max_violation(site.eval_counts).item() for site in balanced.values()]


class TestCalibration:
    @pytest.mark.parametrize("project", [Project, Unindexed])
    def test_last_step_balances_what_the_rule_left_unbalanced(self, project, tmp_path):
        left, solved = project(), project()
        fit(left, tmp_path, None)
        fit(solved, tmp_path, Calibration(num_batches=8))
        assert max(violations(left)) > 0.5
        assert max(violations(solved)) < max(violations(left)) / 4

    def test_batches_go_through_in_evaluation_mode_without_gradients_after_the_last_step(self, tmp_path):
        module = Project()
        fit(module, tmp_path, Calibration(num_batches=3, passes=2))
        assert module.seen == [(True, True)] * 8 + [(False, False)] * 9
        assert module.training
        assert all(site.counts.sum() == 0 for site in find_balanced(module).values())

    def test_what_the_last_step_logged_stays(self, tmp_path):
        trainer = fit(Project(), tmp_path, Calibration(num_batches=3))
        reference = fit(Project(), tmp_path, None)
        assert trainer.callback_metrics["loss"] == reference.callback_metrics["loss"]
        assert "log" not in vars(trainer.lightning_module)

    def test_checkpoint_of_the_last_step_holds_the_solved_biases(self, tmp_path):
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=8, save_top_k=-1, filename="end")
        module = Project()
        fit(module, tmp_path, Calibration(num_batches=8), callbacks=[saver])
        saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
        bias_E = find_balanced(module)["model.layers.0.router"].bias
        assert torch.equal(saved["model.layers.0.router.e_score_correction_bias"], bias_E)
        balanced = balance_(
            Project()
        )  # solves for the same biases without training, since the rates are zero
        balanced.calibrate(lambda project: [project.model(x) for x in loader()], passes=2)
        assert torch.equal(balanced["model.layers.0.router"].bias, bias_E)

    def test_checkpoints_hold_the_batches_that_will_be_among_the_last_and_no_others(self, tmp_path):
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        fit(Project(), tmp_path, Calibration(num_batches=3), callbacks=[saver])
        held = {
            step: torch.load(tmp_path / f"step={step}.ckpt", weights_only=True).get(KEY)
            for step in range(1, 9)
        }
        assert [step for step, windows in held.items() if windows is not None] == [6, 7]
        batches = list(loader())
        for step, (window,) in ((6, held[6]), (7, held[7])):
            assert all(map(torch.equal, window, batches[5:step]))
            assert all(batch.untyped_storage().nbytes() == batch.nbytes for batch in window)

    def test_batches_that_checkpoints_cannot_hold_are_told(self):
        calibration = Calibration(num_batches=2)
        calibration._batches.append({"x": torch.zeros(2), "names": {"a", "b"}})
        checkpoint = {}
        with pytest.warns(UserWarning, match="cannot hold the batches of 'calibration': they contain set"):
            calibration.save(SimpleNamespace(global_step=0, world_size=1), checkpoint)
        assert checkpoint == {}

    @pytest.mark.parametrize("accumulate", [1, 3])
    def test_accumulation_calibrates_once(self, accumulate, tmp_path):
        module = Project()
        fit(module, tmp_path, Calibration(num_batches=1, passes=1), accumulate_grad_batches=accumulate)
        assert module.seen.count((False, False)) == 2

    @pytest.mark.parametrize(("name", "value"), [("num_batches", 0), ("passes", -1), ("passes", 1.5)])
    def test_bad_number_is_refused(self, name, value):
        with pytest.raises(ConfigError, match=f"'{name}' must be an integer >= 1, got {value}"):
            Calibration(**{name: value})

    def test_training_without_an_end_is_refused(self):
        trainer = SimpleNamespace(estimated_stepping_batches=float("inf"))
        with pytest.raises(ConfigError, match="unless max_steps or max_epochs ends the training"):
            Calibration().start(trainer, Project())

    def test_manual_optimization_is_refused(self):
        module = Project()
        module.automatic_optimization = False
        with pytest.raises(ConfigError, match="manual optimization"):
            Calibration().start(SimpleNamespace(estimated_stepping_batches=3), module)
