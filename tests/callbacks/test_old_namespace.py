"""The callbacks in a trainer of ``pytorch_lightning``, whose base classes are not ours."""

from __future__ import annotations

import lightning.pytorch as new
import pytest
import torch
from torch.utils.data import DataLoader

from moe_plugin import LoadMonitor, LossFreeBalancing
from moe_plugin.attach.balanced_model import find_balanced
from moe_plugin.balancing.rules import Sign
from moe_plugin.callbacks.attachment import builds_itself
from tests.hosts import Host

old = pytest.importorskip("pytorch_lightning")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval.*"),
]


def project(namespace, built_late=False):
    """A project of either namespace; one that builds its blocks in configure_model, if so told."""

    class Project(namespace.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.model = None if built_late else Host()

        def training_step(self, batch, batch_idx):
            return self.model(batch).square().mean()

        def validation_step(self, batch, batch_idx):
            self.model(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    if built_late:

        def configure_model(self):
            self.model = self.model or Host()

        Project.configure_model = configure_model
    return Project()


def fitted(namespace, folder, max_epochs=2, ckpt_path=None, **settings):
    """The module, its trainer and its monitor after training with both callbacks."""
    monitor = LoadMonitor(every_n_steps=1)
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "accelerator": "cpu",
    }
    callbacks = [monitor, LossFreeBalancing(Sign(rate=0.125))]
    trainer = namespace.Trainer(max_epochs=max_epochs, callbacks=callbacks, default_root_dir=folder, **quiet)
    module = project(namespace, **settings)
    tokens = torch.randint(0, 32, (8, 6), generator=torch.Generator().manual_seed(1))
    loader = DataLoader(tokens, batch_size=2)  # pyright: ignore[reportArgumentType]
    trainer.fit(module, loader, loader, ckpt_path=ckpt_path)
    return module, trainer, monitor


def biases(module):
    return [site.bias.tolist() for site in find_balanced(module).values()]


class TestOldNamespace:
    @pytest.mark.parametrize("built_late", [False, True])
    def test_biases_equal_those_of_the_new_namespace(self, tmp_path, built_late):
        torch.manual_seed(0)
        of_old, _, monitor = fitted(old, tmp_path / "old", built_late=built_late)
        torch.manual_seed(0)
        of_new, _, expected = fitted(new, tmp_path / "new", built_late=built_late)
        assert find_balanced(of_old).step == 8
        assert biases(of_old) == biases(of_new)
        assert monitor.training_load == expected.training_load
        assert monitor.validation_load == expected.validation_load

    def test_resume_continues_exactly(self, tmp_path):
        whole, _, _ = fitted(old, tmp_path / "whole")
        _, trainer, _ = fitted(old, tmp_path / "half", max_epochs=1)
        resumed, _, _ = fitted(old, tmp_path / "half", ckpt_path=trainer.checkpoint_callback.best_model_path)
        assert find_balanced(resumed).step == 8
        assert biases(resumed) == biases(whole)


class TestBuildsItself:
    @pytest.mark.parametrize("namespace", [old, new])
    def test_overridden_configure_model_is_seen_in_either_namespace(self, namespace):
        assert builds_itself(project(namespace, built_late=True))
        assert not builds_itself(project(namespace))
