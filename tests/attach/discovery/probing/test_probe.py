"""A probe leaves nothing behind: routers that keep something outside of themselves train and compute as before."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributions import Distribution

from moe_plugin.attach.balance import balance_
from moe_plugin.errors import AttachError
from tests.attach.discovery.probing import filing_routers as routers
from tests.attach.discovery.wild_block import D

T = 20
FILING = (
    *(routers.InManager, routers.InGlobalList, routers.InClass, routers.InNewClassAttribute),
    *(routers.InClosure, routers.InDefault, routers.OnFunction, routers.InGlobalName, routers.InConfig),
)

CHANGES = (
    *(lambda state: state.add_(1), lambda state: torch.add(state, 1, out=state), Tensor.normal_),
    *(lambda state: state[:2].fill_(2), lambda state: state.__setitem__(0, 3), Tensor.exponential_),
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def model_of(block):
    return nn.Sequential(block(), block())


class TestProbes:
    @pytest.mark.parametrize("block", FILING)
    def test_filed_losses_are_those_of_real_forwards(self, block):
        model = model_of(block)
        before = len(block.filed())
        balance_(model)
        assert len(block.filed()) == before
        model(torch.randn(T, D))
        loss = block.filed()[-1]
        assert not isinstance(loss, FakeTensor)
        loss.backward()
        assert model[1].gate.weight.grad.abs().sum() > 0

    def test_attributes_of_parameters_are_restored(self):
        model = model_of(routers.OnParameter)
        balance_(model)
        assert model[0].filed_here() == []

    def test_counted_calls_are_those_of_real_forwards(self):
        model, before = model_of(routers.CountsCalls), routers.CALLS
        balance_(model)
        model(torch.randn(T, D))
        assert before + 2 == routers.CALLS

    @pytest.mark.parametrize("change", CHANGES)
    def test_values_that_a_forward_changes_without_its_input_stay(self, change):
        model, state, buffer = model_of(routers.Filing), torch.zeros(3), torch.zeros(3)
        model[0].register_buffer("buffer", buffer)
        model[0].file = lambda loss: (change(state), change(buffer))
        balance_(model, verify=False)
        assert not state.any()
        assert not buffer.any()

    @pytest.mark.parametrize("block", [routers.NoisyTopK, routers.CachesTensor])
    def test_caches_that_a_first_forward_fills_compute_as_in_an_untouched_copy(self, block):
        routers.NOISE.clear()
        routers.positions.cache_clear()
        model, x = model_of(block), torch.randn(97, D)  # as many as a probe has
        untouched = copy.deepcopy(model)
        balanced = balance_(model)
        torch.manual_seed(1)
        out = model(x)
        balanced.remove()
        torch.manual_seed(1)
        after = model(x)
        routers.NOISE.clear()
        routers.positions.cache_clear()
        torch.manual_seed(1)
        expected = untouched(x)
        assert type(out) is torch.Tensor
        assert torch.equal(out, expected)
        assert torch.equal(after, expected)

    def test_real_entries_of_a_cache_stay_if_the_probe_adds_none(self):
        routers.positions.cache_clear()
        routers.positions(2 * 97)  # the probe looks twice, the second time at twice the tokens
        kept = routers.positions(97)
        balance_(model_of(routers.CachesTensor))
        assert routers.positions(97) is kept

    @pytest.mark.parametrize("validates", [True, False])
    def test_second_expert_that_is_drawn_is_found(self, validates):
        before = Distribution._validate_args
        Distribution.set_default_validate_args(validates)
        try:
            sites = balance_(model_of(routers.NoisySecond)).values()
            assert [site.top_k for site in sites] == [2, 2]
            assert Distribution._validate_args is validates
        finally:
            Distribution.set_default_validate_args(before)

    @pytest.mark.parametrize("block", [routers.InThread, routers.InBuiltinModule])
    def test_tensor_that_no_restore_finds_is_an_error(self, block):
        with pytest.raises(AttachError, match=rf"{block.__name__} keeps tensors .*'(_local|math)'.*Adapter"):
            balance_(model_of(block))
        vars(routers.HIDDEN).clear()
        vars(math).pop("loss", None)
