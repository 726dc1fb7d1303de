from __future__ import annotations

import warnings

import pytest

from moe_plugin import LoadMonitor
from moe_plugin.attach.balanced_model import find_balanced
from moe_plugin.callbacks.idle_alarm import PATIENCE
from moe_plugin.errors import AttachError, BalanceWarning
from tests.callbacks.test_loss_free import ManualProject, Project, fit, loader
from tests.callbacks.test_loss_free import pytestmark as quiet

pytestmark = quiet


class Forgetful(ManualProject):
    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(batch))


class WithoutOptimizer(Forgetful):
    def configure_optimizers(self):
        return []


def told(tmp_path, project, batches, callback=None, **settings):
    module = project()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, tmp_path, callback, loader(batches), **settings)
    assert find_balanced(module).step == (0 if project is Forgetful else find_balanced(module).step)
    return [str(each.message) for each in caught if each.category is BalanceWarning]


class TestIdleAlarm:
    def test_steps_that_never_come_are_told_once(self, tmp_path):
        (message,) = told(tmp_path, Forgetful, 3 * PATIENCE)
        assert f"No bias was updated in {PATIENCE + 1} training batches" in message
        assert "(SGD) did not step" in message
        assert "call step() of self.optimizers() in training_step" in message

    def test_short_training_is_told_at_its_end(self, tmp_path):
        (message,) = told(tmp_path, Forgetful, 2)
        assert "No bias was updated in the whole training" in message

    def test_monitor_alone_tells_too(self, tmp_path):
        assert len(told(tmp_path, Forgetful, 2, LoadMonitor())) == 1

    def test_second_training_tells_again(self, tmp_path):
        assert [len(told(tmp_path, Forgetful, 2)) for _ in range(2)] == [1, 1]

    @pytest.mark.parametrize("accumulated", [1, 2 * PATIENCE])
    def test_accumulation_explains_batches_without_a_step(self, tmp_path, accumulated):
        assert told(tmp_path, Project, 2 * PATIENCE, accumulate_grad_batches=accumulated) == []

    def test_manual_steps_are_enough(self, tmp_path):
        assert told(tmp_path, ManualProject, 4) == []

    def test_no_optimizer_at_all_is_an_error(self, tmp_path):
        with pytest.raises(
            AttachError, match=r"configure_optimizers returned none\. Return the one that trains"
        ):
            fit(WithoutOptimizer(), tmp_path)
