from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_plugin import balance_
from moe_plugin.attach.export import Export
from moe_plugin.balancing.rules import Sign
from moe_plugin.errors import AttachError
from tests.hosts import Host, OwningRouter, SoftmaxRouter

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def owning_model():
    """DeepSeek-V3, which owns its bias."""
    config = transformers.DeepseekV3Config(
        **SMALL,
        moe_intermediate_size=8,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=0,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def other_model():
    """Mixtral, which owns none."""
    config = transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def trained(model):
    """The model and its sites after a few steps that move the biases far."""
    balanced = balance_(model, Sign(rate=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        tokens = torch.randint(0, 32, (4, 8))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        balanced.update()
    return balanced


def logits(model):
    tokens = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


class TestExport:
    def test_owned_bias_gives_the_same_logits_without_the_plugin(self, tmp_path):
        torch.manual_seed(0)
        model = owning_model()
        balanced = trained(model)
        exported = balanced.export(model, tmp_path / "bias.safetensors")
        assert exported == Export(tuple(balanced), ())
        assert "2 of 2 biases are in the model's own checkpoint: load the model as always" in str(exported)
        assert not list(tmp_path.iterdir())
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert not any("moe" in name for name in vars(loaded))
        assert torch.equal(logits(loaded), logits(model))

    def test_other_bias_gives_the_same_logits_with_the_sidecar(self, tmp_path):
        torch.manual_seed(0)
        model = other_model()
        balanced = trained(model)
        exported = balanced.export(model, tmp_path / "bias.safetensors")
        assert exported.in_sidecar == tuple(balanced)
        assert exported.sidecar == tmp_path / "bias.safetensors"
        assert f"balance_(model, rule=None).load('{exported.sidecar}')" in str(exported)
        model.save_pretrained(tmp_path / "model")
        loaded = type(model).from_pretrained(tmp_path / "model")
        assert not torch.equal(logits(loaded), logits(model))
        balance_(loaded, rule=None).load(exported.sidecar)
        assert torch.equal(logits(loaded), logits(model))

    def test_names_are_relative_to_the_part_that_is_exported(self, tmp_path):
        whole = nn.ModuleDict({"model": Host(SoftmaxRouter)})
        balanced = balance_(whole)
        balanced["model.layers.1.router"].bias.copy_(torch.arange(4.0))
        assert balanced.export(whole["model"], tmp_path / "bias").in_sidecar == (
            "layers.0.router",
            "layers.1.router",
        )
        alone = balance_(Host(SoftmaxRouter), rule=None)
        alone.load(tmp_path / "bias")
        assert alone["layers.1.router"].bias.tolist() == [0, 1, 2, 3]

    def test_without_a_path_nothing_is_written(self):
        exported = balance_(Host(SoftmaxRouter)).export()
        assert exported.sidecar is None
        assert "load('the file of export(model, path)')" in str(exported)

    def test_part_of_another_model_is_an_error(self):
        with pytest.raises(
            AttachError, match="'model' must be the balanced Host or a part of it, got Linear"
        ):
            balance_(Host(OwningRouter)).export(nn.Linear(2, 2))
