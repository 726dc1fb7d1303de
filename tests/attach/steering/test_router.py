from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from moe_plugin.attach.balance import balance_
from moe_plugin.attach.balanced_model import find_balanced
from moe_plugin.errors import EffectError
from tests.hosts import Host, SoftmaxRouter


def hooked_forward(module, *args, **kwargs):
    """What a hook of another library leaves in place of a module's forward."""
    module.calls = getattr(module, "calls", 0) + 1
    return type(module).forward(module, *args, **kwargs)


def hook_(module):
    module.forward = functools.partial(hooked_forward, module)


def tokens():
    return torch.randint(0, 32, (3, 7))


class TestInstanceForward:
    def hooked(self):
        model = Host()
        for layer in model.layers:
            hook_(layer.router)
        return model

    def test_selection_is_seen_and_steered_behind_a_hook(self):
        model = self.hooked()
        balanced = balance_(model)
        balanced["layers.0.router"].bias[2] = 5.0
        model(tokens())
        assert balanced["layers.0.router"].counts[2] == 21
        assert [layer.router.calls for layer in model.layers] == [1, 1]

    def test_copies_and_pickles_steer_alike(self):
        model, x = self.hooked(), tokens()
        balance_(model)["layers.0.router"].bias[2] = 5.0
        expected = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), expected)
            balanced = find_balanced(other)
            assert balanced is not None
            assert balanced["layers.0.router"].counts[2] == 21 + 21
            assert other.layers[0].router.forward.module is other.layers[0].router

    def test_remove_gives_the_hook_back(self):
        model = self.hooked()
        hooks = [layer.router.forward for layer in model.layers]
        balance_(model).remove()
        assert [layer.router.forward for layer in model.layers] == hooks

    def test_hook_set_after_attaching_works_too(self):
        model = Host()
        balanced = balance_(model)
        hook_(model.layers[0].router)
        model(tokens())
        assert balanced["layers.0.router"].counts.sum() == 42


class NeedsMore(SoftmaxRouter):
    """Cannot be run on hidden states alone, so that its attribute names are all there is to go by."""

    def __init__(self, dim, num_experts, top_k):
        super().__init__(dim, num_experts, top_k)
        self.register_buffer("expert_bias", torch.zeros(num_experts))
        self.table = {}

    def forward(self, x_TD):
        scores_TE = (x_TD @ self.weight.T).sigmoid()
        if scores_TE[0, 0].item() > 2:  # data-dependent
            return None
        ids_TK = torch.topk(self.ranked(scores_TE), self.top_k).indices
        return scores_TE.gather(-1, ids_TK), ids_TK

    def ranked(self, scores_TE):
        return scores_TE + self.expert_bias


class BiasedWeights(NeedsMore):
    def forward(self, x_TD):
        scores_TE = (x_TD @ self.weight.T).sigmoid()
        if scores_TE[0, 0].item() > 2:
            return None
        return torch.topk(self.ranked(scores_TE), self.top_k)


class Ignores(NeedsMore):
    def ranked(self, scores_TE):
        return scores_TE


class Subtracts(NeedsMore):
    def ranked(self, scores_TE):
        return scores_TE - self.expert_bias


class TestProof:
    def test_bias_found_by_name_is_proven_in_the_first_forward(self):
        model = Host(NeedsMore)
        site = balance_(model)["layers.0.router"]
        assert not site.plans
        assert site.host_owns_bias
        model(tokens())
        assert site.plans.keys() == {(True, True)}
        model.eval()(tokens())
        assert site.plans.keys() == {(True, True), (False, True)}

    @pytest.mark.parametrize("router", [Ignores, Subtracts])
    def test_bias_that_selection_ignores_is_an_error(self, router):
        model = Host(router)
        balance_(model)
        with pytest.raises(EffectError, match="owns 'expert_bias', but does not add it to the scores"):
            model(tokens())

    def test_bias_that_reaches_the_gate_weights_is_an_error(self):
        model = Host(BiasedWeights)
        balance_(model)
        with pytest.raises(EffectError, match="depends on the bias beyond which experts are selected"):
            model(tokens())

    def test_bias_that_reaches_the_gate_weights_is_not_looked_for_if_unwanted(self):
        model = Host(BiasedWeights)
        site = balance_(model, verify=False)["layers.0.router"]
        model(tokens())
        assert site.counts.sum() == tokens().numel() * site.top_k

    def test_bias_that_selection_ignores_gets_one_of_ours_where_that_can_be_seen(self):
        class Unused(SoftmaxRouter):
            def __init__(self, dim, num_experts, top_k):
                super().__init__(dim, num_experts, top_k)
                self.register_buffer("expert_bias", torch.zeros(num_experts))

        assert not balance_(Host(Unused))["layers.0.router"].host_owns_bias


class TestTwoRouters:
    def test_block_that_owns_the_biases_of_two_routers_is_driven_at_both(self):
        class Gate(nn.Module):
            def __init__(self):
                super().__init__()
                self.num_experts, self.weight = 4, nn.Parameter(torch.randn(4, 8))

            def forward(self, x, bias):
                scores = (x @ self.weight.T).sigmoid()
                return scores.gather(-1, (scores + bias).topk(2).indices)

        class Pair(nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.two = Gate(), Gate()
                self.bias_one, self.bias_two = nn.Buffer(torch.zeros(4)), nn.Buffer(torch.zeros(4))

            def forward(self, x):
                return self.one(x, self.bias_one) + self.two(x, self.bias_two)

        model = Pair()
        balanced = balance_(model)
        assert [site.bias_place.name for site in balanced.values()] == ["bias_one", "bias_two"]
        for number, site in enumerate(balanced.values()):
            site.bias[number] = 5.0
        model.bfloat16()
        model(torch.randn(10, 8, dtype=torch.bfloat16))
        assert [site.counts[number].item() for number, site in enumerate(balanced.values())] == [10, 10]
        assert all(site.bias.dtype == torch.float32 for site in balanced.values())
        balanced.remove()
        assert type(model) is Pair


class TestHookSetWhileBalanced:
    """accelerate keeps the forward that it replaces in an attribute."""

    def test_it_works_after_remove(self):
        model, x = Host(), tokens()
        expected = model(x)
        balanced = balance_(model)
        router: Any = model.layers[0].router
        router._old_forward = router.forward
        router.forward = lambda *args: router._old_forward(*args)
        balanced.remove()
        assert torch.equal(model(x), expected)

    def test_hook_taken_off_while_balanced_does_not_stop_remove(self):
        model = Host()
        hook_(model.layers[0].router)
        balanced = balance_(model)
        del vars(model.layers[0].router)["forward"]
        balanced.remove()
        assert "_moe_site" not in vars(model.layers[0].router)
