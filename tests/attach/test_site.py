from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from moe_plugin import Sign, balance_
from moe_plugin.apps.models.size import fixed_experts_per_token
from moe_plugin.attach.discovery.routed_experts import find_routed_experts
from moe_plugin.types import AllocatesExperts, Allocation, Routing
from tests.hosts import Host, OwningRouter, SoftmaxRouter


class HalfRouter(SoftmaxRouter):
    """A router that nobody here has seen: a token uses its second expert if its score exceeds 1 - level."""

    def __init__(self, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__(dim, num_experts, top_k)
        self.register_buffer("height", torch.tensor(0.5))

    def allocation(self) -> Allocation:
        return Allocation(1.5, self.num_experts, level=self.get_buffer("height"))

    def forward(self, x_TD: Tensor) -> Routing:
        scores_TE = (x_TD @ self.weight.T).float().softmax(-1)
        weights_TK, ids_TK = torch.topk(scores_TE, self.top_k, dim=-1)
        slack_TK = self.get_buffer("height") - (1 - weights_TK.detach())
        slack_TK[:, 0] = torch.inf
        used_TK = slack_TK > 0
        return Routing(weights_TK * used_TK, ids_TK, scores_TE, None, used_TK, slack_TK)


class SharesRouter(SoftmaxRouter):
    """Another: its first two experts should get twice the load of the others, and the last computes nothing."""

    def allocation(self) -> Allocation:
        return Allocation(1.0, self.num_experts - 1, [1 / 3, 1 / 3, 1 / 6, 1 / 6])


class RoutingBlock(nn.Module):
    """Takes a `Routing`, as our own layer does."""

    def __init__(self, router: nn.Module, dim: int) -> None:
        super().__init__()
        self.router = router
        self.experts = nn.ModuleList(nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.flatten(0, -2)
        routing = self.router(x_TD)
        weights_TK, ids_TK = (
            (routing.weights_TK, routing.expert_ids_TK) if isinstance(routing, Routing) else routing
        )
        y_TD = torch.zeros_like(x_TD)
        for expert, module in enumerate(self.experts):
            weight_T = torch.where(ids_TK == expert, weights_TK, 0.0).sum(-1, keepdim=True)
            y_TD = y_TD + weight_T * module(x_TD)
        return y_TD.view_as(x)


class TestRoutersThatShareExpertsOut:
    """A new router is one new file: what it says by `allocation` is all that a site needs to know."""

    def test_level_of_an_unknown_router_is_held_at_its_target(self) -> None:
        torch.manual_seed(0)
        block = RoutingBlock(HalfRouter(8, 4, 2), 8)
        balanced = balance_(block, Sign(rate=0.0))
        site = balanced["router"]
        assert site.level is block.router.height
        assert site.target_k == 1.5
        x_TD = torch.randn(400, 8)
        for _ in range(60):
            block(x_TD).sum().backward()
            record = balanced.update()
        used_TK = site.router(x_TD).used_TK
        assert record.tokens["router"] == 400
        assert record.counts["router"].sum() == used_TK.sum()
        assert used_TK.sum() / 400 == pytest.approx(1.5, abs=0.02)

    def test_shares_of_an_unknown_router_are_what_its_loads_go_to(self) -> None:
        torch.manual_seed(0)
        block = RoutingBlock(SharesRouter(8, 4, 2), 8)
        balanced = balance_(block)
        assert balanced["router"].num_routed == 3
        for _ in range(300):
            block(torch.randn(256, 8)).sum().backward()
            balanced.update()
        ids_TK = balanced["router"].router(torch.randn(4096, 8))[1]
        shares_E = torch.bincount(ids_TK.flatten(), minlength=4) / ids_TK.numel()
        torch.testing.assert_close(shares_E, torch.tensor([1 / 3, 1 / 3, 1 / 6, 1 / 6]), atol=0.03, rtol=0)

    def test_ordinary_router_shares_nothing_out(self) -> None:
        site = balance_(Host())["layers.0.router"]
        assert not isinstance(site.router, AllocatesExperts)
        assert (site.allocation, site.level, site.target_k) == (None, None, None)
        assert site.num_routed == site.num_experts == 4


class TestSite:
    def test_description_is_what_discovery_found(self) -> None:
        site = balance_(Host(OwningRouter, num_experts=8, top_k=3))["layers.1.router"]
        assert site.style is site.found.style
        assert (site.num_experts, site.top_k, site.style.kind) == (8, 3, "topk")
        assert site.found.bias is not None
        assert site.bias_place == site.found.bias
        assert site.bias_place.owner is site.router

    def test_copy_of_a_model_has_sites_of_its_own(self) -> None:
        model = Host()
        balance_(model)
        twin = copy.deepcopy(model)
        first, second = (each.layers[0].router._moe_site for each in (model, twin))
        second.bias.add_(1.0)
        assert second.router is twin.layers[0].router
        assert (first.bias.tolist(), second.bias.tolist()) == ([0.0] * 4, [1.0] * 4)


class TestSizes:
    def test_experts_of_an_unknown_router_count_as_it_says(self) -> None:
        """The first three of four experts compute, and a token uses one of them on average."""
        block = RoutingBlock(SharesRouter(8, 4, 2), 8)
        block.experts = block.experts[:3]
        (routed,) = find_routed_experts(nn.Sequential(block))
        assert (routed.num_experts, routed.top_k) == (3, 1.0)
        assert fixed_experts_per_token(nn.Sequential(block)) is None
