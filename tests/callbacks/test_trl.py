"""The callbacks in TRL's SFTTrainer: the load is logged with TRL's own metrics, and its auxiliary loss is off if asked.

Shape legend: B batch, S sequence.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

trl = pytest.importorskip("trl", reason="needs trl: pip install trl")
from moe_plugin.callbacks.hugging_face import (  # noqa: E402
    LoadMonitorTrainerCallback,
    LossFreeTrainerCallback,
)
from moe_plugin.errors import BalanceWarning  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*'pin_memory' argument is set as true.*"),
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
]
BATCH, COEFFICIENT = 4, 0.5


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    return importlib.import_module("trl_sft")


def trained(example, folder, callback, **settings):
    """A trainer after two steps, its model before them, and the first batch."""
    torch.manual_seed(0)
    model, data = example.new_model(), example.walks(2 * BATCH, seed=0)
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = COEFFICIENT
    before = copy.deepcopy(model)
    arguments = trl.SFTConfig(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=BATCH,
        shuffle_dataset=False,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        **settings,
    )
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=data, processing_class=example.tokenizer(), callbacks=[callback]
    )
    trainer.train()
    return trainer, before, torch.tensor(data["input_ids"][:BATCH])


def cross_entropy_and_loss(model, tokens_BS):
    output = model(input_ids=tokens_BS, output_router_logits=True)
    logits_BSV = output.logits[:, :-1]
    expected = cross_entropy(logits_BSV.flatten(0, 1), tokens_BS[:, 1:].flatten()).item()
    return expected, expected + COEFFICIENT * output.aux_loss.item()


class TestSFTTrainer:
    def test_history_has_the_load_next_to_trl_s_own_metrics(self, example, tmp_path):
        callback = LoadMonitorTrainerCallback(detail="full")
        trainer, *_ = trained(example, tmp_path, callback)
        first, last, _ = trainer.state.log_history
        assert {"loss", "mean_token_accuracy", "aux_loss", "load/max_violation_worst"} <= first.keys()
        for layer, counts in enumerate(callback.balanced.record.counts.values()):
            load = counts.double()
            expected = (load.max() / load.mean() - 1).item()
            assert last[f"load_layers/max_violation/layers.{layer}"] == pytest.approx(expected)
            assert load.sum() == BATCH * example.LENGTH * 2

    def test_auxiliary_loss_that_trl_adds_is_a_warning(self, example, tmp_path):
        with pytest.warns(BalanceWarning, match=r"router_aux_loss_coef=0.5.*aux_loss='off'"):
            trainer, before, tokens_BS = trained(example, tmp_path, LossFreeTrainerCallback())
        _, loss = cross_entropy_and_loss(before, tokens_BS)
        assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, abs=1e-4)

    def test_auxiliary_loss_is_switched_off_and_restored(self, example, tmp_path):
        callback = LossFreeTrainerCallback(aux_loss="off")
        trainer, before, tokens_BS = trained(example, tmp_path, callback)
        expected, _ = cross_entropy_and_loss(before, tokens_BS)
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-4)
        assert trainer.router_aux_loss_coef == trainer.model.router_aux_loss_coef == 0
        callback.balanced.remove()
        assert trainer.router_aux_loss_coef == trainer.model.router_aux_loss_coef == COEFFICIENT

    def test_trl_s_own_switch_leaves_nothing_to_warn_of(self, example, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error", BalanceWarning)
            trained(example, tmp_path, LossFreeTrainerCallback(), router_aux_loss_coef=0.0)
