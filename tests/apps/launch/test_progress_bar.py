"""The progress line shows the loss, and no step waits for it."""

from __future__ import annotations

import lightning
import pytest
from lightning.pytorch.trainer.connectors.logger_connector import result
from torch.utils.data import DataLoader

from moe_plugin.apps.launch.progress_bar import ProgressBar
from tests.apps.models.small_models import language_model, token_batch


class Shown(ProgressBar):
    def __init__(self):
        super().__init__(refresh_rate=3)
        self.losses = []

    def get_metrics(self, trainer, pl_module):
        metrics = super().get_metrics(trainer, pl_module)
        self.losses.append((trainer.fit_loop.epoch_loop.batch_idx, metrics["train/loss"]))
        assert metrics["train/loss"] == trainer.callback_metrics["train/loss"].item()
        return metrics


@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning 2.6 on torch 2.13
def test_loss_is_shown_at_each_refresh_and_read_in_no_other_step(tmp_path, monkeypatch):
    read, convert = [], result.convert_tensors_to_scalars
    monkeypatch.setattr(
        result, "convert_tensors_to_scalars", lambda value: read.append(value) or convert(value)
    )
    bar = Shown()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=7,
        callbacks=[bar],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(language_model(), DataLoader([token_batch(2)] * 8, batch_size=None))
    assert {batch for batch, _ in bar.losses} >= {2, 5}
    assert {batch for batch, _ in bar.losses} <= {2, 5, 6}
    assert not read
