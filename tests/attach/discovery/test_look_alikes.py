"""Routers that the library has never seen are found, steered and counted by their structure."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from moe_plugin.attach.balance import balance_
from moe_plugin.balancing.rules import Sign
from moe_plugin.errors import AttachError
from tests.attach.discovery import look_alikes
from tests.attach.discovery.look_alikes import HOST_BIAS, OWN_BIAS, D, E, K

TOKENS = 30
everyone = pytest.mark.parametrize("block", [*OWN_BIAS, *HOST_BIAS], ids=lambda block: block.__name__)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Model(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def inputs():
    return torch.randn(3, TOKENS // 3, D)


def step(model, x):
    out = model(x)
    out.square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out, grads


class TestLookAlikes:
    @everyone
    def test_numbers_are_found_without_being_told(self, block):
        sites = list(balance_(Model(block)).values())
        k = getattr(block, "k", K)
        assert [(site.num_experts, site.top_k) for site in sites] == [(E, k)] * 2

    @everyone
    def test_zero_bias_changes_no_bit(self, block):
        model, x = Model(block), inputs()
        untouched = copy.deepcopy(model)
        balance_(model)
        (out, grads), (expected, expected_grads) = step(model, x), step(untouched, x)
        assert torch.equal(out, expected)
        assert grads.keys() == expected_grads.keys()
        assert all(torch.equal(grad, expected_grads[name]) for name, grad in grads.items())

    @everyone
    def test_every_token_counts_k_times_and_updates_move_the_bias(self, block):
        model = Model(block)
        balanced = balance_(model, Sign(rate=0.1))
        step(model, inputs())
        assert [site.counts.sum().item() for site in balanced.values()] == [
            TOKENS * site.top_k for site in balanced.values()
        ]
        balanced.update()
        assert all(site.bias.any() for site in balanced.values())

    @everyone
    def test_large_bias_draws_every_token_and_stays_out_of_gate_weights(self, block):
        model, x = Model(block), inputs()
        balanced = balance_(model)
        for site in balanced.values():
            site.bias[1] = 50.0
        out = model(x)
        assert out.abs().max() < 500  # a bias in the gate weights would show
        for site in balanced.values():
            if block in (look_alikes.GroupsByZeros, look_alikes.GroupsByInfinity):
                assert 0 < site.counts[1] < TOKENS  # only where its group is open
            else:
                assert site.counts[1] == TOKENS

    @everyone
    def test_remove_restores(self, block):
        model = Model(block)
        model(inputs())
        before = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
        keys = list(model.state_dict())
        balanced = balance_(model)
        assert list(model.state_dict()) == keys
        balanced.remove()
        assert {name: (type(module), set(vars(module))) for name, module in model.named_modules()} == before

    @pytest.mark.parametrize(("block", "name"), HOST_BIAS.items())
    def test_own_bias_is_recognised_by_what_it_does(self, block, name):
        assert [site.bias_name for site in balance_(Model(block)).values()] == [name] * 2

    @pytest.mark.parametrize("block", OWN_BIAS, ids=lambda block: block.__name__)
    def test_other_tensors_with_one_entry_per_expert_are_no_selection_bias(self, block):
        assert not any(site.host_owns_bias for site in balance_(Model(block)).values())

    def test_bias_in_linear_layer_stays_with_the_gate_weights(self):
        model = Model(look_alikes.LinearBias)
        before = model.layers[0].bias.detach().clone()
        balanced = balance_(model, Sign(rate=0.1))
        step(model, inputs())
        balanced.update()
        assert torch.equal(model.layers[0].bias, before)


class TestRefusals:
    def test_expert_choice_is_refused_with_its_reason(self):
        with pytest.raises(
            AttachError, match=r"'layers.1': ExpertChoice lets its experts choose their tokens"
        ):
            balance_(Model(look_alikes.ExpertChoice))

    def test_experts_with_unseen_selection_are_an_error_that_says_what_to_do(self):
        with pytest.raises(
            AttachError,
            match=r"'layers.0': Sampling selects experts by multinomial.* Write an Adapter for that block",
        ):
            balance_(Model(look_alikes.Sampling))

    def test_one_stranger_among_routers_is_an_error(self):
        model = nn.Sequential(look_alikes.Blockwise(), look_alikes.Sampling())
        with pytest.raises(AttachError, match=r"'1': Sampling selects experts by multinomial"):
            balance_(model)
        assert list(balance_(model, sites="0")) == ["0"]

    def test_features_are_no_experts(self):
        with pytest.raises(AttachError, match=r"Modules that call topk: layers.0: SparseAutoencoder"):
            balance_(Model(look_alikes.SparseAutoencoder))


class TestProbing:
    @everyone
    def test_attaching_changes_no_state_of_the_host(self, block):
        model = Model(block)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        buffers = {name: (id(value), value.clone()) for name, value in model.named_buffers()}
        generator = torch.get_rng_state()
        balance_(model).remove()
        assert torch.equal(torch.get_rng_state(), generator)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        for name, value in model.named_buffers():
            assert id(value) == buffers[name][0]
            assert torch.equal(value, buffers[name][1])
            assert type(value.data) is torch.Tensor

    def test_large_model_on_meta_device_is_understood_alike(self):
        with torch.device("meta"):
            model = Model(look_alikes.SeparateRouter)
        assert [site.bias_name for site in balance_(model).values()] == ["nudge"] * 2
