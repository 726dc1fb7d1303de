"""Each example balances: MaxVio falls below a quarter of its matched control's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import lightning
import pytest
from hydra import compose, initialize_config_dir

from moe_plugin import LoadMonitor
from moe_plugin.attach.balanced_model import find_balanced
from moe_plugin.attach.settings import DEFAULT_RULE
from moe_plugin.balancing.rules import Proportional, Sign

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "lightning_cli": "jsonargparse",
    "lightning_mixtral": "transformers",
    "hugging_face_trainer": "transformers",
    "old_namespace": "pytorch_lightning",
    "litgpt_moe": "litgpt.model",
    "fused_experts": "transformers",
    "pretrained_lora": "peft",
    "trl_sft": "trl",
}
SLOW = (
    *("fused_experts", "hugging_face_trainer", "lightning_cli", "old_namespace", "pretrained_lora"),
    "trl_sft",
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*"),
    # Lightning's own use of jsonargparse.
    pytest.mark.filterwarnings("ignore:\\s*By default only one JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:\\s*.* was deprecated in v4.* removed in v5"),
    pytest.mark.filterwarnings("ignore:.*'pin_memory' argument is set as true.*"),
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
]


def load(name: str) -> ModuleType:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"needs {NEEDS[name]}")
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def scripts() -> list[Any]:
    names = sorted(path.stem for path in EXAMPLES.glob("*.py"))
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in names]


@pytest.mark.parametrize("name", scripts())
class TestExample:
    def test_balanced_run_violates_less_than_a_quarter_of_its_control(self, name, monkeypatch):
        monkeypatch.setattr(sys, "argv", [name])  # LightningCLI warns of pytest's own words
        example = load(name)
        balanced, control = example.main(balanced=True), example.main(balanced=False)
        assert balanced["max_violation"] < control["max_violation"] / 4
        assert balanced["loss"] < 1.05 * control["loss"]


class TestHydraApp:
    """The app as its own command runs it: callbacks and rules come from moe_plugin's groups."""

    @staticmethod
    def train(monkeypatch: pytest.MonkeyPatch, *words: str) -> lightning.Trainer:
        pytest.importorskip("transformers")
        folder = EXAMPLES / "hydra_app"
        monkeypatch.syspath_prepend(str(folder))
        with initialize_config_dir(str(folder / "configs"), version_base="1.3"):
            config = compose("train", list(words))
        return load("hydra_app/train").train(config)

    @pytest.mark.slow
    def test_word_on_the_command_line_balances(self, monkeypatch):
        violations, losses = [], []
        for callbacks in ("callbacks=[default,loss_free]", "callbacks=default"):
            trainer = self.train(monkeypatch, callbacks)
            (monitor,) = [each for each in trainer.callbacks if isinstance(each, LoadMonitor)]
            violations.append(fmean(load.max_violation_global for load in monitor.training_load.values()))
            losses.append(trainer.callback_metrics["train/loss"].item())
        assert violations[0] < violations[1] / 4
        assert losses[0] < 1.05 * losses[1]

    @pytest.mark.parametrize(
        ("words", "rule"),
        [
            (["+balancing=loss_free", "+rule=sign", "rule.rate=0.01"], Sign(rate=0.01)),
            (["experiment=balanced"], DEFAULT_RULE),
        ],
    )
    def test_other_words_of_its_page_choose_the_rule(self, words, rule, monkeypatch):
        trainer = self.train(monkeypatch, *words, "trainer.max_steps=1")
        assert find_balanced(trainer.lightning_module).settings.rule == rule


class TestRulesOfLightningCLI:
    """LightningCLI reads rules from type hints, in which it may mistake one dataclass for another."""

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ([], DEFAULT_RULE),
            (["--trainer.callbacks.rule.rate=0.01"], Proportional(rate=0.01)),
            (["--trainer.callbacks.rule=moe_plugin.balancing.rules.Sign"], Sign()),
            (
                [
                    "--trainer.callbacks.rule=moe_plugin.balancing.rules.Proportional",
                    "--trainer.callbacks.rule.rate=0.5",
                ],
                Proportional(rate=0.5),
            ),
        ],
    )
    def test_rule_of_the_command_line_is_taken(self, words, expected, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["lightning_cli"])
        switches = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"]
        quiet = [f"--trainer.{switch}=false" for switch in switches]
        callback = "--trainer.callbacks+=moe_plugin.LossFreeBalancing"
        cli = load("lightning_cli").run(
            ["fit", "--trainer.max_steps=1", "--trainer.accelerator=cpu", *quiet, callback, *words]
        )
        assert find_balanced(cli.model).settings.rule == expected
