from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from moe_plugin import balance_
from moe_plugin.errors import ConfigError
from moe_plugin.sharding import materialize_, shard_
from tests.apps.models.small_models import language_model
from tests.hosts import Host, OwningRouter

CPU = torch.device("cpu")


def on_meta(make, seed=0):
    torch.manual_seed(seed)
    with torch.device("meta"):
        return make()


def whole(model):
    return {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in model.state_dict().items()
    }


class TestMaterialize:
    def test_values_follow_from_seed_and_name(self):
        first, again, other = (on_meta(language_model, seed) for seed in (0, 0, 1))
        for model, seed in ((first, 0), (again, 0), (other, 1)):
            torch.manual_seed(seed)
            torch.randn(5 * (model is again))  # what was drawn before does not matter
            materialize_(model, CPU)
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
        assert not torch.equal(first.network.embedding.weight, other.network.embedding.weight)

    def test_distribution_is_that_of_eager_initialisation(self):
        drawn, eager = on_meta(lambda: language_model(dim=128)), language_model(dim=128)
        materialize_(drawn, CPU)
        for name, expected in eager.state_dict().items():
            value = drawn.state_dict()[name]
            if expected.std() > 0:
                assert value.std() / expected.std() == pytest.approx(1, abs=0.12), name
            else:
                assert torch.equal(value, expected), name

    def test_biases_are_zero_whoever_owns_them(self):
        for make in (language_model, lambda: Host(), lambda: Host(OwningRouter)):
            model = on_meta(make)
            for router in (m for m in model.modules() if type(m).__name__.endswith("Router")):
                router.reset_parameters = lambda module=router: fill(module)
            balanced = balance_(model)
            materialize_(model, CPU)
            for site in balanced.values():
                assert torch.equal(site.bias, torch.zeros(site.num_experts))

    def test_generator_is_left_as_it_was(self):
        model = on_meta(language_model)
        before = torch.get_rng_state()
        materialize_(model, CPU)
        assert torch.equal(torch.get_rng_state(), before)

    def test_model_with_storage_is_left_alone(self):
        model = language_model()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        materialize_(model, CPU)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    def test_parameter_that_nothing_draws_is_named(self):
        class Scale(nn.Module):
            def __init__(self):
                super().__init__()
                self.factor = nn.Parameter(torch.ones(2))

        model = on_meta(lambda: nn.Sequential(nn.Linear(2, 2), Scale()))
        message = (
            r"'meta_init' needs a method Scale\.reset_parameters\(\) that draws 'factor' of '1'\. Write it"
        )
        with pytest.raises(ConfigError, match=message):
            materialize_(model, CPU)

    def test_model_of_transformers_is_initialised_by_its_own_method(self):
        transformers = pytest.importorskip("transformers")
        config = transformers.DeepseekV3Config(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, intermediate_size=32, n_group=1,
            topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, initializer_range=0.5,
        )  # fmt: skip
        make = transformers.AutoModelForCausalLM.from_config
        model, eager = on_meta(lambda: make(config)), make(config)
        materialize_(model, CPU)
        tokens = torch.arange(12).view(2, 6)
        assert model(input_ids=tokens).logits.isfinite().all()
        assert model.model.layers[0].self_attn.o_proj.weight.std().item() == pytest.approx(0.5, rel=0.2)
        for (name, value), expected in zip(model.named_buffers(), eager.buffers(), strict=True):
            assert torch.equal(value, expected), name

    def test_shards_are_those_of_the_whole_model(self, on_ranks):
        alone = on_meta(language_model)
        torch.manual_seed(0)
        materialize_(alone, CPU)
        sharded = on_ranks(2, materialized_on_rank)
        for rank in range(2):
            assert all(torch.equal(sharded[rank][name], tensor) for name, tensor in whole(alone).items())


def fill(module):
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data.zero_()


def materialized_on_rank(rank, results):
    model = on_meta(language_model)
    shard_(model.network, init_device_mesh("cpu", (2,)))
    torch.manual_seed(0)
    materialize_(model, CPU)
    results[rank] = whole(model)
