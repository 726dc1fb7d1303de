from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from moe_plugin import Calibration, LossFreeBalancing
from moe_plugin.attach.balanced_model import find_balanced
from moe_plugin.balancing.rules import Sign
from moe_plugin.errors import ConfigError
from tests.callbacks.test_loss_free import RATE, LateProject, ValidatedProject, biases, loader, trainer
from tests.callbacks.test_loss_free import pytestmark as quiet
from tests.hosts import Host, OwningRouter

pytestmark = [
    *quiet,
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback.*"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from.*"),
]
DECAY = 0.5


class Averaged(ValidatedProject):
    """Has a buffer before its routers, which must not be paired with a bias."""

    def __init__(self, *given):
        super().__init__(*given, lr=0.1)
        self.model.embedding.register_buffer("mine", torch.full((4,), 7.0))

    def test_step(self, batch, batch_idx):
        return self.validation_step(batch, batch_idx)


class LateAveraged(LateProject):
    def validation_step(self, batch, batch_idx):
        self.loss(batch)


class Seen(pl.Callback):
    """The bias of the first router after each step, in each validation batch and in evaluation."""

    def __init__(self):
        self.steps, self.validation = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.steps.append(torch.tensor(biases(pl_module)[0], dtype=torch.float64))

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.validation.append(biases(pl_module)[0])


def slow_average(steps):
    """The average that the documentation of `EMAWeightAveraging` describes."""
    average = steps[0]
    for value in steps[1:]:
        average = DECAY * average + (1 - DECAY) * value
    return average.tolist()


def run_averaged(tmp_path, order, module=None, resume=None, epochs=1, averages=True, **settings):
    module, seen = module or Averaged(), Seen()
    ours = LossFreeBalancing(Sign(rate=RATE), **settings)
    average = EMAWeightAveraging(decay=DECAY) if averages else pl.Callback()
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    callbacks = [*([ours, average] if order == "before" else [average, ours]), seen, saver]
    run = trainer(None, tmp_path, callbacks=callbacks, enable_checkpointing=True, max_epochs=epochs)
    run.fit(module, loader(), loader(1), ckpt_path=resume)
    return module, seen, average


@pytest.mark.parametrize("order", ["before", "after"])
class TestEitherOrder:
    @pytest.mark.parametrize("project", [Averaged, lambda: Averaged(OwningRouter), LateAveraged])
    def test_validation_and_the_trained_model_have_the_averaged_bias(self, tmp_path, order, project):
        module, seen, _ = run_averaged(tmp_path, order, project())
        expected = slow_average(seen.steps)
        assert len(seen.steps) == 4
        torch.testing.assert_close(seen.validation[-1], expected)
        torch.testing.assert_close(biases(module)[0], expected)

    def test_controller_continues_from_the_current_bias(self, tmp_path, order):
        _, alone, _ = run_averaged(tmp_path / "alone", order, averages=False)
        _, seen, _ = run_averaged(tmp_path / "averaged", order)
        assert torch.equal(torch.stack(seen.steps), torch.stack(alone.steps))

    def test_other_buffers_keep_their_values(self, tmp_path, order):
        module, _, _ = run_averaged(tmp_path, order)
        assert module.model.embedding.mine.tolist() == [7.0] * 4

    def test_checkpoint_holds_each_bias_with_its_weights(self, tmp_path, order):
        _, seen, _ = run_averaged(tmp_path, order)
        saved = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
        name = "model.layers.0.router"
        averaged, current = saved["moe_plugin"]["sites"], saved["callbacks"]["LossFreeBalancing"]["sites"]
        torch.testing.assert_close(averaged[name]["bias"].tolist(), slow_average(seen.steps))
        assert current[name]["bias"].tolist() == seen.steps[-1].tolist()

    def test_resumed_training_continues_both_exactly(self, tmp_path, order):
        settings = {"bias_in_state_dict": order == "after"}
        straight, _, average = run_averaged(tmp_path / "straight", order, epochs=2, **settings)
        path = tmp_path / "straight" / "step=4.ckpt"
        resumed, seen, again = run_averaged(tmp_path / "resumed", order, resume=path, epochs=2, **settings)
        assert len(seen.steps) == 4
        for one, other in ((straight, resumed), (average._average_model.module, again._average_model.module)):
            assert biases(one) == biases(other)
            assert torch.equal(one.model.head.weight, other.model.head.weight)

    def test_test_from_a_checkpoint_takes_the_averaged_bias(self, tmp_path, order):
        _, seen, _ = run_averaged(tmp_path, order)
        module = Averaged()
        run = trainer(LossFreeBalancing(Sign(rate=RATE)), tmp_path)
        run.test(module, loader(), ckpt_path=tmp_path / "step=4.ckpt", verbose=False)
        torch.testing.assert_close(biases(module)[0], slow_average(seen.steps))

    def test_training_without_an_average_continues_from_what_its_weights_had(self, tmp_path, order):
        _, seen, _ = run_averaged(tmp_path / "averaged", order)
        module = Averaged()
        path = tmp_path / "averaged" / "step=4.ckpt"
        run_averaged(tmp_path / "plain", order, module, resume=path, averages=False)
        torch.testing.assert_close(biases(module)[0], slow_average(seen.steps))

    def test_calibration_is_refused(self, tmp_path, order):
        with pytest.raises(ConfigError, match="'calibration' must be null with WeightAveraging"):
            run_averaged(tmp_path, order, calibration=Calibration(2))


def test_average_of_a_model_attached_by_hand_is_its_own(tmp_path):
    module, _, average = run_averaged(tmp_path, "after")
    assert find_balanced(average._average_model.module) is not find_balanced(module)
    assert isinstance(module.model, Host)
