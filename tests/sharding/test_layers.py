from __future__ import annotations

import pytest
from torch import nn

from moe_plugin.sharding import find_layers
from tests.apps.models.small_models import language_model
from tests.hosts import Host


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)


class Dense(Block):
    pass


class Net(nn.Module):
    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


class TestFindLayers:
    def test_reference_model_and_hand_written_one(self):
        ours, host = language_model().network, Host()
        assert find_layers(ours) == list(ours.layers)
        assert find_layers(host) == list(host.layers)

    def test_model_of_transformers(self):
        transformers = pytest.importorskip("transformers")
        config = transformers.Qwen3MoeConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
            head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
        )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(config)
        assert find_layers(model) == list(model.model.layers)

    def test_members_of_two_repeated_classes_and_of_a_sequential(self):
        mixed = nn.ModuleList([Dense(), Block(), Dense(), Block()])
        stack = nn.Sequential(nn.Embedding(2, 2), Block(), Block(), nn.Linear(2, 2))
        assert find_layers(Net(layers=mixed)) == list(mixed)
        assert find_layers(Net(body=Net(stack=stack))) == [stack[1], stack[2]]

    def test_single_layer_counts(self):
        layers = nn.ModuleList([Block()])
        assert find_layers(Net(layers=layers)) == list(layers)

    def test_experts_and_plain_lists_are_no_layers(self):
        experts, heads = nn.ModuleList([Block(), Block()]), nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        assert find_layers(Net(block=Net(experts=experts), heads=heads)) == []
