from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_plugin.attach.discovery.survey import find_routers
from moe_plugin.attach.fused.projections import Layout, experts_of_routers, layout_of
from moe_plugin.experts import GroupedExperts
from tests.hosts import Host
from tests.stacked_hosts import D, E, H, InputFirstExperts, StackedExperts, StackedHost


class Biased(StackedExperts):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(E, 2 * H))


class Normed(StackedExperts):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(D)


class OtherArguments(StackedExperts):
    def forward(self, x, weights, ids):
        return super().forward(x, ids, weights)


class TestLayout:
    @pytest.mark.parametrize(
        ("dim", "hidden"),
        [(8, 6), (6, 8), (8, 8), (8, 4), (4, 8), (8, 16), (16, 8), (4, 4), (2, 1), (1, 2), (1, 1)],
    )
    def test_shapes_tell_both_layouts_whatever_the_sizes(self, dim, hidden):
        experts = StackedExperts(dim, hidden)
        assert layout_of(experts) == Layout("gate_up_proj", "down_proj", input_first=False)
        experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach().mT)
        experts.down_proj = nn.Parameter(experts.down_proj.detach().mT)
        assert layout_of(experts) == Layout("gate_up_proj", "down_proj", input_first=True)

    def test_names_do_not_matter(self):
        assert layout_of(InputFirstExperts()) == Layout("w_in", "w_out", input_first=True)

    @pytest.mark.parametrize("kind", [Biased, Normed])
    def test_further_parameters_are_told(self, kind):
        assert "must be two projections" in layout_of(kind())

    def test_quantised_weights_are_told(self):
        experts = StackedExperts()
        experts.down_proj.data = experts.down_proj.data.to(torch.float8_e4m3fn)
        assert "must have one floating-point dtype" in layout_of(experts)

    def test_replaced_forward_is_told(self):
        experts = StackedExperts()
        experts.forward = experts.forward
        assert "something else has replaced its forward" in layout_of(experts)

    def test_our_own_experts_are_told(self):
        assert layout_of(GroupedExperts(E, D, H)) == "they are the fused experts already"

    def test_other_arguments_are_told(self):
        assert layout_of(OtherArguments()).endswith("top_k_weights, and takes x, weights, ids")


class TestExpertsOfRouters:
    def test_each_router_has_those_of_its_block(self):
        model = StackedHost()
        layers, without = experts_of_routers(model, find_routers(model))
        assert layers == {f"layers.{i}.experts": model.layers[i].experts for i in range(2)}
        assert without == []

    def test_list_of_modules_is_not_stacked(self):
        model = Host()
        layers, without = experts_of_routers(model, find_routers(model))
        assert layers == {}
        assert without == ["layers.0.router", "layers.1.router"]

    def test_shared_layer_is_named_once(self):
        model = StackedHost()
        model.layers[1].experts = model.layers[0].experts
        layers, without = experts_of_routers(model, find_routers(model))
        assert list(layers) == ["layers.0.experts"]
        assert without == []
