from __future__ import annotations

from itertools import combinations

import pytest
import torch

from moe_plugin.apps.plan.nodes_per_token import Selection
from moe_plugin.errors import ConfigError
from moe_plugin.routing import Router, Sigmoid


def nodes_by_enumeration(selection, nodes):
    """The mean over every choice of experts."""
    per_node = selection.num_experts // nodes
    choices = combinations(range(selection.num_experts), selection.top_k)
    reached = [len({expert // per_node for expert in choice}) for choice in choices]
    return sum(reached) / len(reached)


class TestExpectedNodes:
    @pytest.mark.parametrize("nodes", [1, 2, 4, 8])
    @pytest.mark.parametrize("selection", [Selection(16, 1), Selection(16, 3), Selection(16, 5)], ids=str)
    def test_equals_the_mean_over_all_choices(self, selection, nodes):
        expected = nodes_by_enumeration(selection, nodes)
        assert selection.expected_nodes(nodes) == pytest.approx(expected, rel=0.02)

    @pytest.mark.parametrize("nodes", [2, 8, 16])
    def test_a_router_with_groups_reaches_as_many(self, nodes):
        torch.manual_seed(0)
        limits = {"num_groups": 8, "top_k_groups": 4}
        router = Router(64, 256, 8, score=Sigmoid(), **limits)
        nodes_TK = router(torch.randn(4096, 64)).expert_ids_TK // (256 // nodes)
        reached = torch.zeros(4096, nodes).scatter_(1, nodes_TK, 1.0).sum(1).mean().item()
        assert Selection(256, 8, **limits).expected_nodes(nodes) == pytest.approx(reached, rel=0.02)

    def test_limit_is_never_exceeded(self):
        assert Selection(256, 8, 8, 4).expected_nodes(8) <= 4 < Selection(256, 8).expected_nodes(8)

    def test_uneven_nodes_are_refused(self):
        with pytest.raises(ConfigError, match=r"must spread 24 experts evenly over its nodes \(5\)"):
            Selection(24, 2).expected_nodes(5)
