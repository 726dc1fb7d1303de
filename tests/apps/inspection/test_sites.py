from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_plugin.apps.inspection.sites import BiasStatistics, inspect_model
from moe_plugin.attach.balance import balance_
from tests.attach.discovery.odd_styles import ExpertChoice
from tests.hosts import GroupedRouter, Host, OwningRouter, SoftmaxRouter


class TestInspectModel:
    def test_two_layers_of_each_kind_of_router(self):
        expected = {
            SoftmaxRouter: ("softmax", 1, "our bias, at topk", None),
            GroupedRouter: ("softmax", 2, "our bias, at topk", None),
            OwningRouter: (
                "sigmoid",
                1,
                "its own e_score_correction_bias",
                "layers.1.router.e_score_correction_bias",
            ),
        }
        for router, values in expected.items():
            inspection = inspect_model(Host(router))
            assert [site.name for site in inspection.sites] == ["layers.0.router", "layers.1.router"]
            site = inspection.sites[1]
            assert (site.num_experts, site.top_k, site.is_proven) == (4, 2, True)
            assert (site.score, site.groups, site.driven, site.bias_key) == values

    def test_model_is_left_as_it_is(self):
        model = Host(OwningRouter)
        before = {name: dict(module.__dict__) for name, module in model.named_modules()}
        inspect_model(model)
        assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before

    def test_meta_model_has_no_bias_values(self):
        with torch.device("meta"):
            model = Host(OwningRouter)
        assert inspect_model(model).sites[0].bias is None

    def test_bias_values_are_measured(self):
        model = Host(OwningRouter)
        model.layers[0].router.e_score_correction_bias.copy_(torch.tensor([-1.0, 0.0, 0.0, 3.0]))
        bias = inspect_model(model).sites[0].bias
        assert (bias.lowest, bias.highest) == (-1, 3)
        assert bias.deviation == pytest.approx(1.5)

    @pytest.mark.parametrize("router", [SoftmaxRouter, OwningRouter])
    def test_balanced_model_is_described_too(self, router):
        model = Host(router)
        plain = inspect_model(model)
        balance_(model)
        sites = inspect_model(model).sites
        assert [site.name for site in sites] == [site.name for site in plain.sites]
        for now, before in zip(sites, plain.sites, strict=True):
            assert now.driven.endswith("balanced now")
            assert (now.score, now.num_experts, now.bias_key) == (
                before.score,
                before.num_experts,
                before.bias_key,
            )
            assert now.bias == BiasStatistics(0, 0, 0)

    def test_expert_choice_is_refused_with_the_reason(self):
        inspection = inspect_model(nn.Sequential(ExpertChoice(), ExpertChoice()))
        assert inspection.sites == ()
        assert "expert choice" in inspection.refused["1"]

    def test_dense_model_has_no_sites(self):
        inspection = inspect_model(nn.Linear(2, 2))
        assert (inspection.sites, dict(inspection.refused), dict(inspection.strangers)) == ((), {}, {})
