from __future__ import annotations

import pytest
import torch

from moe_plugin import LossFreeBalancing, balance_
from moe_plugin.attach.frozen_routers import is_frozen
from moe_plugin.balancing.rules import Load, Sign
from moe_plugin.errors import ConfigError
from tests.hosts import Host, OwningRouter, SoftmaxRouter

TRAINED_E = torch.tensor([0.5, 0.0, -0.25, -0.25])


def host(router, *, frozen, trained):
    """A host whose first router is frozen or its bias trained."""
    torch.manual_seed(0)
    model = Host(router)
    model.layers[0].router.requires_grad_(not frozen)
    if trained:
        model.layers[0].router.e_score_correction_bias.copy_(TRAINED_E)
    return model


def assert_moved_by_the_first_step(balanced, record):
    for name, site in balanced.items():
        load = Load(record.counts[name], torch.zeros(site.num_experts))
        assert torch.equal(site.bias, Sign().step(load, 0.1, {}).float())


def moved(model, **settings):
    """Whether the biases of the two routers move in a training step."""
    balanced = balance_(model, Sign(rate=0.1), **settings)
    before = [site.bias.clone() for site in balanced.values()]
    tokens = torch.randint(0, 32, (2, 8))
    model(tokens).sum().backward()
    balanced.update()
    return [not torch.equal(site.bias, b) for site, b in zip(balanced.values(), before, strict=True)]


class TestFrozenRouters:
    @pytest.mark.parametrize(
        ("router", "frozen", "trained", "setting", "moves"),
        [
            (SoftmaxRouter, True, False, "auto", True),
            (OwningRouter, True, False, "auto", True),
            (OwningRouter, True, True, "auto", False),
            (OwningRouter, False, True, "auto", True),
            (OwningRouter, True, True, "balance", True),
            (OwningRouter, True, False, "keep", False),
            (SoftmaxRouter, True, False, "keep", False),
            (OwningRouter, False, True, "keep", True),
        ],
    )
    def test_setting_decides_about_frozen_routers_only(self, router, frozen, trained, setting, moves):
        model = host(router, frozen=frozen, trained=trained)
        assert moved(model, frozen_routers=setting) == [moves, True]

    def test_kept_bias_still_has_its_load_counted(self):
        model = host(OwningRouter, frozen=True, trained=True)
        assert moved(model) == [False, True]
        assert balance_(model, Sign(rate=0.1)).record.counts["layers.0.router"].sum() == 2 * 8 * 2

    def test_other_setting_of_the_callback_is_an_error(self):
        with pytest.raises(ConfigError, match="'frozen_routers' must be"):
            LossFreeBalancing(frozen_routers="freeze")

    def test_other_setting_is_an_error_before_anything_is_attached(self):
        model = Host()
        with pytest.raises(
            ConfigError, match="'frozen_routers' must be 'auto', 'balance' or 'keep', got 'freeze'"
        ):
            balance_(model, frozen_routers="freeze")
        assert type(model.layers[0].router) is SoftmaxRouter


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
class TestPeft:
    """LoRA on a Hugging Face Mixtral."""

    @pytest.fixture
    def mixtral(self):
        pytest.importorskip("peft")
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = transformers.MixtralConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
        return transformers.MixtralForCausalLM(config)

    def lora(self, model):
        import peft

        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))

    def step(self, model, balanced):
        tokens = torch.randint(0, 32, (4, 8))
        model(input_ids=tokens, labels=tokens).loss.backward()
        return balanced.update()

    def logits(self, model):
        with torch.no_grad():
            return model.eval()(input_ids=torch.arange(16).view(2, 8)).logits

    def test_balanced_before_peft_stays_balanced(self, mixtral):
        balanced = balance_(mixtral, Sign(rate=0.1))
        tuned = self.lora(mixtral)
        record = self.step(tuned, balanced)
        assert all(counts_E.sum() == 4 * 8 * 2 for counts_E in record.counts.values())
        assert_moved_by_the_first_step(balanced, record)

    def test_lora_freezes_the_routers_and_they_are_balanced(self, mixtral):
        balanced = balance_(self.lora(mixtral), Sign(rate=0.1))
        assert all(is_frozen(site) for site in balanced.values())
        assert_moved_by_the_first_step(balanced, self.step(balanced._model, balanced))

    def test_adapters_saved_and_loaded_give_the_same_logits(self, mixtral, tmp_path):
        import copy

        import peft

        base = copy.deepcopy(mixtral)
        tuned = self.lora(mixtral)
        balanced = balance_(tuned, Sign(rate=0.1))
        self.step(tuned, balanced)
        tuned.save_pretrained(tmp_path)
        assert not any("moe" in key for key in peft.get_peft_model_state_dict(tuned))
        exported = balanced.export(path=tmp_path / "bias.safetensors")
        loaded = peft.PeftModel.from_pretrained(base, tmp_path)
        balance_(loaded, rule=None).load(exported.sidecar)
        assert torch.equal(self.logits(loaded), self.logits(tuned))

    def test_merged_model_keeps_its_biases_and_exports_them(self, mixtral, tmp_path):
        tuned = self.lora(mixtral)
        balanced = balance_(tuned, Sign(rate=0.1))
        self.step(tuned, balanced)
        expected = self.logits(tuned)
        merged = tuned.merge_and_unload()
        torch.testing.assert_close(self.logits(merged), expected)
        exported = balanced.export(merged, tmp_path / "bias.safetensors")
        assert exported.in_sidecar == tuple(name.removeprefix("base_model.model.") for name in balanced)
        merged.save_pretrained(tmp_path / "merged")
        loaded = type(mixtral).from_pretrained(tmp_path / "merged")
        balance_(loaded, rule=None).load(exported.sidecar)
        torch.testing.assert_close(self.logits(loaded), expected)
