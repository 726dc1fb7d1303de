"""Load-balancing losses that models add by themselves are found, switched off and restored.

Shape legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from moe_plugin import LossFreeBalancing, balance_
from moe_plugin.attach.settings import BalanceSettings
from moe_plugin.errors import BalanceWarning, ConfigError
from moe_plugin.losses import GlobalBatchLoss, LoadBalancingLoss, RouterZLoss, SequenceLoss, TotalLoss
from moe_plugin.losses.in_model import find_own_losses, losses_of_trainer
from tests.hosts import Host, SoftmaxRouter

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
TOKENS_BS = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))


def mixtral(**settings):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(num_local_experts=4, router_aux_loss_coef=0.5, **SIZES, **settings)
    )


def jetmoe(**settings):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = SIZES | {"num_local_experts": 4, "aux_loss_coef": 0.5, "kv_channels": 8}
    return transformers.JetMoeForCausalLM(transformers.JetMoeConfig(**sizes, **settings))


def qwen3_vl(**settings):
    """A model whose loss reads the weight from its configuration."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = SIZES | {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8, "router_aux_loss_coef": 0.5}
    rotary = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen3VLMoeConfig(
        text_config=text | {"rope_parameters": rotary} | settings,
        vision_config=vision | {"deepstack_visual_indexes": [0]},
    )
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


def loss_and_cross_entropy(model, **given):
    output = model(input_ids=TOKENS_BS, labels=TOKENS_BS, output_router_logits=True, **given)
    logits_BSV = output.logits[:, :-1]
    return output.loss, cross_entropy(logits_BSV.flatten(0, 1).float(), TOKENS_BS[:, 1:].flatten()), output


class DeepSeekGate(SoftmaxRouter):
    """DeepSeek's own code for V2 calls the weight 'alpha'."""

    def __init__(self, dim, num_experts, top_k):
        super().__init__(dim, num_experts, top_k)
        self.alpha, self.seq_aux = 0.001, True


@pytest.mark.parametrize("model", [mixtral, jetmoe, qwen3_vl])
class TestTransformers:
    def test_loss_is_off_until_removed(self, model):
        model = model()
        loss, expected, output = loss_and_cross_entropy(model)
        torch.testing.assert_close(loss, expected + 0.5 * output.aux_loss)
        balanced = balance_(model, aux_loss="off")
        loss, expected, _ = loss_and_cross_entropy(model)
        torch.testing.assert_close(loss, expected)
        balanced.remove()
        loss, expected, output = loss_and_cross_entropy(model)
        torch.testing.assert_close(loss, expected + 0.5 * output.aux_loss)

    def test_loss_that_the_configuration_turns_on_is_a_warning(self, model):
        with pytest.warns(BalanceWarning, match=r"aux_loss_coef=0.5.*aux_loss='off'"):
            balance_(model(output_router_logits=True))

    def test_loss_that_it_leaves_off_is_none(self, model):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            balance_(model())


class TestWarning:
    @pytest.mark.parametrize("aux_loss", ["off", "keep"])
    def test_answered_question_is_not_asked(self, aux_loss):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            balanced = balance_(mixtral(output_router_logits=True), aux_loss=aux_loss)
        assert len(balanced.switched_off) == (aux_loss == "off")

    def test_watching_alone_asks_nothing(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            balance_(mixtral(output_router_logits=True), rule=None)

    def test_weights_without_effect_are_left_alone(self):
        model = Host()
        model.config = SimpleNamespace(to_dict=dict, aux_loss_alpha=0.001, router_aux_loss_coef=0.1)
        assert find_own_losses(model) == []
        assert balance_(model, aux_loss="off").switched_off == []
        assert model.config.aux_loss_alpha == 0.001

    def test_gate_of_deepseek_is_a_loss_by_layer(self):
        model = Host(DeepSeekGate)
        with pytest.warns(BalanceWarning, match="layers.0.router.alpha=0.001, layers.1.router.alpha"):
            balance_(model).remove()
        balance_(model, aux_loss="off")
        assert [layer.router.alpha for layer in model.layers] == [0.0, 0.0]

    def test_copy_of_a_model_is_restored_by_itself(self):
        model = Host(DeepSeekGate)
        balanced = balance_(model, aux_loss="off")
        other = copy.deepcopy(model)
        balanced.remove()
        assert (model.layers[0].router.alpha, other.layers[0].router.alpha) == (0.001, 0.0)


class TestOurs:
    @pytest.mark.parametrize("loss", [LoadBalancingLoss(0.01), GlobalBatchLoss(0.01)])
    def test_switched_off_and_restored(self, loss):
        model = Host()
        model.auxiliary_loss = TotalLoss({"balance": loss, "z": RouterZLoss(0.5)})
        with pytest.warns(BalanceWarning, match=r"auxiliary_loss.coefficient=0.01"):
            balance_(model).remove()
        balanced = balance_(model, aux_loss="off")
        assert loss.coefficient == 0.0
        assert model.auxiliary_loss.losses["z"].coefficient == 0.5
        balanced.remove()
        assert loss.coefficient == 0.01

    def test_small_loss_within_sequences_belongs_to_the_bias(self):
        model = Host()
        model.auxiliary_loss = SequenceLoss()
        assert find_own_losses(model) == []


class TestTrainer:
    def test_weight_of_a_trainer_is_found(self):
        trainer = SimpleNamespace(aux_loss_enabled=True, router_aux_loss_coef=0.25)
        (loss,) = losses_of_trainer(trainer)
        assert (loss.coefficient, loss.is_on) == (0.25, True)
        loss.switch_off_()
        assert trainer.router_aux_loss_coef == 0.0
        assert losses_of_trainer(nn.Identity()) == []


class TestSettings:
    def test_other_words_are_an_error(self):
        with pytest.raises(ConfigError, match="'aux_loss' must be 'warn', 'off' or 'keep', got 'on'"):
            LossFreeBalancing(aux_loss="on")

    def test_off_as_yaml_reads_it_is_off(self):
        assert BalanceSettings(aux_loss=False).aux_loss == "off"
