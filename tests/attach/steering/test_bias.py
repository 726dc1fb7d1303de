from __future__ import annotations

import copy
import pickle

import pytest
import torch

from moe_plugin import balance_
from moe_plugin.errors import BalanceWarning
from tests.hosts import Host, OwningRouter, SoftmaxRouter

KEYS = ["layers.0.router.moe_plugin_bias", "layers.1.router.moe_plugin_bias"]


def balanced_host(router=SoftmaxRouter, **settings):
    torch.manual_seed(0)
    model = Host(router)
    balanced = balance_(model, **settings)
    for place, site in enumerate(balanced.values()):
        site.bias.copy_(torch.arange(4.0) + place + 1)
    return model, balanced


def new_host(**settings):
    model = Host()
    return model, balance_(model, **settings)


def biases(balanced):
    return [site.bias.tolist() for site in balanced.values()]


class TestBiasInStateDict:
    def test_it_is_there_on_request_only_and_remove_takes_it_out(self):
        plain = Host().state_dict().keys()
        assert new_host()[0].state_dict().keys() == plain
        model, balanced = new_host(bias_in_state_dict=True)
        assert sorted(model.state_dict().keys() - plain) == KEYS
        balanced.remove()
        assert model.state_dict().keys() == plain
        assert type(model.layers[0].router) is SoftmaxRouter

    def test_bias_of_the_model_s_own_has_one_key(self):
        model, _ = balanced_host(OwningRouter, bias_in_state_dict=True)
        assert model.state_dict().keys() == Host(OwningRouter).state_dict().keys()

    @pytest.mark.parametrize("settings", [{"bias_in_state_dict": True}, {}])
    @pytest.mark.parametrize("assign", [False, True])
    def test_any_balanced_model_loads_it_strictly(self, settings, assign):
        saved, source = balanced_host(bias_in_state_dict=True)
        model, balanced = new_host(**settings)
        model.load_state_dict(saved.state_dict(), assign=assign)
        assert biases(balanced) == biases(source)
        assert torch.equal(model.head.weight, saved.head.weight)

    def test_bias_that_was_cast_becomes_fp32(self):
        saved, source = balanced_host(bias_in_state_dict=True)
        state = {name: value.bfloat16() for name, value in saved.state_dict().items()}
        model, balanced = new_host(bias_in_state_dict=True)
        model.load_state_dict(state, assign=True)
        assert biases(balanced) == biases(source)
        assert {site.bias.dtype for site in balanced.values()} == {torch.float32}

    def test_older_checkpoint_loads_strictly_with_a_warning(self):
        torch.manual_seed(1)
        older = Host()
        model, balanced = new_host(bias_in_state_dict=True)
        with pytest.warns(
            BalanceWarning, match="no 'moe_plugin_bias', so the model continues from a bias of 0"
        ):
            model.load_state_dict(older.state_dict())
        assert torch.equal(model.head.weight, older.head.weight)
        assert biases(balanced) == [[0.0] * 4] * 2

    def test_older_checkpoint_keeps_biases_that_were_loaded_first(self):
        model, balanced = balanced_host(bias_in_state_dict=True)
        before = biases(balanced)
        model.load_state_dict(Host().state_dict())
        assert biases(balanced) == before

    def test_model_that_is_not_balanced_refuses_it(self):
        with pytest.raises(RuntimeError, match=r"Unexpected key.*moe_plugin_bias"):
            Host().load_state_dict(balanced_host(bias_in_state_dict=True)[0].state_dict())

    @pytest.mark.parametrize("settings", [{"bias_in_state_dict": True}, {}])
    def test_other_number_of_experts_is_an_error(self, settings):
        state = balanced_host(bias_in_state_dict=True)[0].state_dict()
        state[KEYS[0]] = torch.zeros(5)
        with pytest.raises(RuntimeError, match="moe_plugin_bias"):
            new_host(**settings)[0].load_state_dict(state)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies_have_it(self, copied):
        model, balanced = balanced_host(bias_in_state_dict=True)
        state = copied(model).state_dict()
        assert [state[key].tolist() for key in KEYS] == biases(balanced)
