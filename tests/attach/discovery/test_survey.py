from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from moe_plugin.attach.discovery.findings import routers_to_balance
from moe_plugin.attach.discovery.survey import survey
from moe_plugin.errors import AttachError
from moe_plugin.experts import MoEBlock
from tests.hosts import Block, GroupedRouter, Host, OwningRouter, SoftmaxRouter


def choose(scores_TE, k):
    return select(scores_TE, k)


def select(scores_TE, k):
    return torch.topk(scores_TE, k)


class RouterInBlock(Block):
    """A block that selects experts itself, its numbers in a config: older Mixtral style."""

    def __init__(self):
        nn.Module.__init__(self)
        self.config = type("Config", (), {"num_local_experts": 6, "num_experts_per_tok": 3})()
        self.gate = nn.Linear(4, 6, bias=False)

    def forward(self, x_TD):
        return self.route(self.gate(x_TD))

    def route(self, logits_TE):
        return logits_TE.softmax(-1).topk(3, dim=-1)


class RouterByFunction(SoftmaxRouter):
    def forward(self, x_TD):
        return choose((x_TD @ self.weight.T).softmax(-1), self.top_k)


class BeamSearch(nn.Module):
    """Calls topk and is no router."""

    def forward(self, logits):
        return logits.topk(4)


def found_in(model):
    return routers_to_balance(survey(model), model)


class TestSurvey:
    def test_ordinary_router_is_found_with_its_numbers(self):
        first, second = found_in(Host(num_experts=8, top_k=3))
        assert (first.name, first.style.num_experts, first.style.top_k) == ("layers.0.router", 8, 3)
        assert second.name == "layers.1.router"
        assert first.bias is None
        assert not first.style.zeros_masked

    def test_owned_bias_is_found(self):
        found = found_in(Host(OwningRouter))[0]
        assert found.bias == (found.module, "e_score_correction_bias")

    def test_groups_are_found(self):
        assert found_in(Host(GroupedRouter))[0].style.zeros_masked

    def test_block_that_selects_by_itself_is_found_through_its_config(self):
        found = found_in(nn.Sequential(RouterInBlock()))
        assert [(router.name, router.style.num_experts, router.style.top_k) for router in found] == [
            ("0", 6, 3)
        ]

    def test_router_that_selects_by_a_function_is_found(self):
        found = found_in(Host(RouterByFunction))
        assert [(router.name, router.style.num_experts, router.style.top_k) for router in found] == [
            ("layers.0.router", 4, 2),
            ("layers.1.router", 4, 2),
        ]

    def test_our_own_block_is_found_like_any_other(self):
        from moe_plugin.experts import GroupedExperts
        from moe_plugin.routing import Router
        from moe_plugin.routing.scores import Sigmoid

        block = MoEBlock(Router(8, 4, 2, score=Sigmoid()), GroupedExperts(4, 8, 8))
        found = found_in(nn.ModuleList([block]))
        assert [(router.name, router.bias.name) for router in found] == [("0.router", "expert_bias")]

    def test_other_users_of_topk_are_no_routers(self):
        model = nn.Sequential(Host(), BeamSearch())
        assert [router.name for router in found_in(model)] == ["0.layers.0.router", "0.layers.1.router"]

    def test_nothing_found_lists_what_calls_topk(self):
        with pytest.raises(AttachError, match="Modules that call topk: 0: BeamSearch"):
            found_in(nn.Sequential(BeamSearch()))

    def test_hooks_of_the_host_are_not_run_and_stay(self):
        model, calls = Host(), []
        for module in model.modules():
            module.register_forward_pre_hook(lambda *_: calls.append("pre"))
            module.register_forward_hook(lambda *_: calls.append("post"))
        assert [router.name for router in found_in(model)] == ["layers.0.router", "layers.1.router"]
        assert calls == []
        model(torch.zeros(1, 1, dtype=torch.int64))
        called = [module for module in model.modules() if not isinstance(module, nn.ModuleList)]
        assert Counter(calls) == {"pre": len(called), "post": len(called)}
