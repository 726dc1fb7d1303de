"""Routers as people write them in public code are found, steered and counted without being told of."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from moe_plugin.attach.balance import balance_
from moe_plugin.attach.balanced_model import find_balanced
from moe_plugin.balancing.rules import Sign
from tests.attach.discovery import wild_places, wild_styles
from tests.attach.discovery.wild_places import OtherKInEvaluation
from tests.attach.discovery.wild_styles import D, Wild

B, S = 3, 10
ROWS = {"tokens": B * S, "sequences": B, "halves": 2 * B * S}
NAMED = vars(wild_styles) | vars(wild_places)
STYLES = [each for each in NAMED.values() if isinstance(each, type) and issubclass(each, Wild)]
everyone = pytest.mark.parametrize("block", STYLES, ids=lambda block: block.__name__)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Model(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.blocks = [block() for _ in range(2)]
        self.layers = nn.ModuleList(self.blocks)

    def forward(self, x):
        for layer in self.blocks:
            x = x + layer(x, *layer.also(x))
        return x


def inputs():
    return torch.randn(B, S, D)


def step(model, x):
    out = model(x)
    out.square().mean().backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class TestWildStyles:
    @everyone
    def test_zero_bias_changes_no_bit_and_every_choice_counts(self, block):
        model, x = Model(block), inputs()
        untouched = copy.deepcopy(model)
        balanced = balance_(model, Sign(rate=0.1))
        (out, grads), (expected, expected_grads) = step(model, x), step(untouched, x)
        assert torch.equal(out, expected)
        assert grads.keys() == expected_grads.keys()
        assert all(torch.equal(grad, expected_grads[name]) for name, grad in grads.items())
        assert [site.top_k for site in balanced.values()] == [block.k] * 2
        assert [site.counts.sum() for site in balanced.values()] == [ROWS[block.rows] * block.k] * 2
        balanced.update()
        assert all(site.bias.any() for site in balanced.values())

    @everyone
    @pytest.mark.parametrize("size", [0.3, 50.0])
    def test_bias_steers_and_stays_out_of_gate_weights(self, block, size):
        model, x = Model(block), inputs()
        balanced = balance_(model)
        first = next(iter(balanced.values()))
        one_E, some_E = torch.eye(first.num_experts)[1], torch.randn(first.num_experts)
        first.bias.copy_(some_E * size if size < 1 else one_E * size)
        layer = model.blocks[0]
        torch.testing.assert_close(layer(x, *layer.also(x)), layer.reference(x, first.bias))
        if size > 1:
            assert first.counts[1] == ROWS[block.rows]

    @everyone
    def test_copies_route_alike_and_remove_restores(self, block):
        model, x = Model(block), inputs()
        before = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
        expected = model(x)
        balanced = balance_(model)
        for site in balanced.values():
            site.bias[1] = 1e-9  # moves no choice
        assert torch.equal(model(x), expected)
        for site in balanced.values():
            site.bias[2] = 50.0
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), model(x))
            assert find_balanced(other) is not None
        balanced.remove()
        assert torch.equal(model(x), expected)
        after = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
        assert {name: kind for name, (kind, _) in after.items()} == {
            name: kind for name, (kind, _) in before.items()
        }
        assert not any("moe" in name for _, names in after.values() for name in names)

    def test_other_k_in_evaluation_is_counted_as_it_is(self):
        model = Model(OtherKInEvaluation)
        site = balance_(model)["layers.0"]
        model.eval()(inputs())
        assert site.eval_counts.sum() == ROWS["tokens"] * (site.top_k - 1)
