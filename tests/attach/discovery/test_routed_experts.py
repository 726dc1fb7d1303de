from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_plugin.attach.discovery.routed_experts import find_routed_experts
from moe_plugin.errors import ConfigError
from tests.apps.models.small_models import language_model


class Host(nn.Module):
    """A block as found in the wild: a router, its experts, and a shared one."""

    def __init__(self, router: nn.Module, experts: nn.Module, **attributes: object) -> None:
        super().__init__()
        self.gate, self.experts, self.shared_expert = router, experts, nn.Linear(8, 8)
        self.__dict__.update(attributes)


class Stacked(nn.Module):
    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(num_experts, 8, 12))
        self.w1_bias = nn.Parameter(torch.randn(num_experts, 12))


def expert_list(num_experts: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(8, 8) for _ in range(num_experts))


class TestFindRoutedExperts:
    def test_own_model_has_one_per_layer(self):
        found = find_routed_experts(language_model(num_dense=1))
        assert [(e.num_experts, e.top_k) for e in found] == [(4, 2)]

    @pytest.mark.parametrize("experts", [Stacked(6), expert_list(6)], ids=["stacked", "list"])
    def test_experts_beside_a_router_are_found(self, experts):
        model = nn.ModuleDict({"mlp": Host(nn.Linear(8, 6), experts, top_k=3)})
        (found,) = find_routed_experts(model)
        assert found.module is experts
        assert (found.num_experts, found.top_k) == (6, 3)

    def test_top_k_may_be_in_a_config(self):
        config = type("Config", (), {"num_experts_per_tok": 2})()
        assert find_routed_experts(Host(nn.Linear(8, 6), Stacked(6), config=config))[0].top_k == 2

    def test_list_without_a_router_beside_it_is_none(self):
        assert find_routed_experts(Host(nn.Linear(8, 5), expert_list(6), top_k=2)) == []

    def test_missing_top_k_names_the_fix(self):
        model = nn.ModuleDict({"mlp": Host(nn.Linear(8, 6), Stacked(6))})
        with pytest.raises(
            ConfigError, match=r"'mlp\.experts' must have .*, got None\. Set 'top_k' on its router"
        ):
            find_routed_experts(model)
