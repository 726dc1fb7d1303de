"""Routers as people write them in public code are found, steered and counted, unknown to the library."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from moe_plugin.attach.balance import balance_
from moe_plugin.attach.balanced_model import find_balanced
from moe_plugin.balancing.rules import Sign
from tests.attach.discovery import wild_biases, wild_block, wild_calls, wild_inputs, wild_places, wild_styles
from tests.attach.discovery.wild_block import Block, D, after_sign, reference, reference_ids

B, S = 3, 10
ROWS = {"tokens": B * S, "sequences": B, "halves": 2 * B * S}
NAMED = {
    name: each
    for module in (wild_block, wild_styles, wild_calls, wild_places, wild_inputs, wild_biases)
    for name, each in vars(module).items()
    if isinstance(each, type) and issubclass(each, Block) and each is not Block and name[0] != "_"
}
everyone = pytest.mark.parametrize("block", NAMED.values(), ids=NAMED)


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


def parts_of(model):
    """Return what `remove` restores: the class and attributes of every module."""
    return {name: (type(module), set(vars(module))) for name, module in model.named_modules()}


def values_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(some, others):
    assert some.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in some.items())


class TestWildStyles:
    @everyone
    def test_numbers_and_own_bias_are_found(self, block):
        sites = balance_(Model(block)).values()
        assert [(site.num_experts, site.top_k) for site in sites] == [(block.places, block.k)] * 2
        assert [site.bias_place.name if site.host_owns_bias else None for site in sites] == [
            block.bias_name
        ] * 2

    @everyone
    def test_zero_bias_changes_no_bit_and_every_choice_counts(self, block):
        model, x = Model(block), inputs()
        plain = copy.deepcopy(model)
        balanced = balance_(model, Sign(rate=0.1))
        (out, grads), (expected, expected_grads) = step(model, x), step(plain, x)
        assert torch.equal(out, expected)
        assert_equal(grads, expected_grads)
        assert [site.counts.sum() for site in balanced.values()] == [ROWS[block.rows] * block.k] * 2

    @everyone
    def test_update_moves_the_bias_and_no_other_tensor(self, block):
        model = Model(block)
        balanced = balance_(model, Sign(rate=0.1))
        step(model, inputs())
        before = values_of(model)
        expected = {name: after_sign(site.bias, site.counts, 0.1) for name, site in balanced.items()}
        balanced.update()
        torch.testing.assert_close({name: site.bias for name, site in balanced.items()}, expected)
        moved = [name for name, value in values_of(model).items() if not torch.equal(value, before[name])]
        assert [name.split(".")[-1] for name in moved] == ([block.bias_name] * 2 if block.bias_name else [])

    @everyone
    @pytest.mark.parametrize("size", [0.3, 50.0])
    def test_bias_selects_and_stays_out_of_gate_weights(self, block, size):
        model, x = Model(block), inputs()
        site = next(iter(balance_(model).values()))
        one_E, some_E = torch.eye(site.num_experts)[1], torch.randn(site.num_experts)
        site.bias.copy_(some_E * size if size < 1 else one_E * size)
        layer = model.blocks[0]
        torch.testing.assert_close(layer(x, *layer.also(x)), reference(layer, x, site.bias))
        expected = reference_ids(layer, x, site.bias).flatten().bincount(minlength=site.num_experts)
        assert site.counts.tolist() == expected.tolist()
        if size > 1:  # no bias opens a group
            drawn, rows = site.counts[1], ROWS[block.rows]
            assert 0 < drawn < rows if block.has_groups else drawn == rows

    @everyone
    def test_copies_route_alike_and_remove_restores(self, block):
        model, x = Model(block), inputs()
        expected = model(x)
        before, keys = parts_of(model), list(model.state_dict())
        balanced = balance_(model)
        assert list(model.state_dict()) == keys
        biases = [site.bias.clone() for site in balanced.values()]
        for site in balanced.values():
            site.bias[1] += 1e-9  # moves no choice
        assert torch.equal(model(x), expected)
        for site in balanced.values():
            site.bias[2] = 50.0
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), model(x))
            assert list(find_balanced(other)) == list(balanced)
        for site, bias_E in zip(balanced.values(), biases, strict=True):
            if site.host_owns_bias:  # it stays
                site.bias.copy_(bias_E)
        balanced.remove()
        assert torch.equal(model(x), expected)
        assert parts_of(model) == before

    @everyone
    def test_attaching_changes_no_state_of_the_host(self, block):
        model = Model(block)
        before, generator = values_of(model), torch.get_rng_state()
        buffers = {name: (id(value), value.clone()) for name, value in model.named_buffers()}
        balance_(model).remove()
        assert torch.equal(torch.get_rng_state(), generator)
        assert_equal(values_of(model), before)
        for name, value in model.named_buffers():
            assert id(value) == buffers[name][0]
            assert torch.equal(value, buffers[name][1])
            assert type(value.data) is torch.Tensor

    def test_other_k_in_evaluation_is_counted_as_it_is(self):
        model = Model(wild_inputs.OtherKInEvaluation)
        site = balance_(model)["layers.0"]
        model.eval()(inputs())
        assert site.eval_counts.sum() == ROWS["tokens"] * (site.top_k - 1)

    def test_large_model_on_meta_device_is_understood_alike(self):
        with torch.device("meta"):
            model = Model(wild_biases.BiasAsArgument)
        assert [site.bias_place.name for site in balance_(model).values()] == ["nudge"] * 2
