from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from moe_plugin.attach.balance import balance_
from moe_plugin.attach.site import Site
from moe_plugin.attach.verification.battery import CHECKS, verify_model
from moe_plugin.errors import AttachError, ConfigError, EffectError
from tests.attach.verification.small_models import (
    AmaxGateRouter,
    D,
    Layers,
    SortedGatesRouter,
    SortingRouter,
    Top1Router,
    run,
)
from tests.hosts import GroupedRouter, OwningRouter, SoftmaxRouter

ALL = set(CHECKS)


def statuses(model, checks=None, call=run):
    return {result.name: result.status for result in verify_model(model, call, checks=checks)}


class TestRightModel:
    @pytest.mark.parametrize("router", [SoftmaxRouter, OwningRouter])
    def test_every_check_passes(self, router):
        assert statuses(Layers(router)) == dict.fromkeys(CHECKS, "passed")

    @pytest.mark.parametrize("router", [Top1Router, SortingRouter])
    def test_every_eager_check_passes_for_other_calls(self, router):
        top_k = 1 if router is Top1Router else 2
        checks = ALL - {"compile"}
        found = statuses(Layers(router, top_k=top_k), checks)
        assert found == {name: "passed" for name in CHECKS if name in checks}

    def test_groups_leave_only_the_default_rule_out(self):
        found = statuses(Layers(GroupedRouter), ALL - {"compile"})
        assert {name for name, status in found.items() if status != "passed"} == {"default_rule_balances"}

    def test_model_and_random_state_are_untouched(self):
        model = Layers()
        before = {name: dict(vars(part)) for name, part in model.named_modules()}
        state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        verify_model(model, run, checks=ALL - {"compile"})
        assert {name: dict(vars(part)) for name, part in model.named_modules()} == before
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random)


class TestSites:
    def test_only_named_sites_are_verified(self):
        (result,) = verify_model(Layers(), run, sites="layers.1.*", checks=["counts"])
        assert result.detail.startswith("1 router,")


class TestUnfitModel:
    def test_model_without_routers_is_an_error(self):
        with pytest.raises(AttachError, match="No router"):
            verify_model(nn.Linear(D, D), run)

    def test_unknown_check_is_an_error(self):
        with pytest.raises(ConfigError, match="no_such_check"):
            verify_model(Layers(), run, checks=["no_such_check"])

    def test_model_that_cannot_be_copied_is_one_failure(self):
        class Single(Layers):
            def __deepcopy__(self, memo):
                raise TypeError("there is only one of me")

        (result,) = verify_model(Single(), run)
        assert (result.name, result.status) == ("copy", "failed")
        assert "only one of me" in result.detail

    def test_run_that_differs_each_time_is_named(self):
        noise = iter(range(1000))
        results = verify_model(Layers(), lambda model: run(model) + next(noise), checks=["counts"])
        assert [(result.name, result.status) for result in results[:1]] == [("run", "failed")]

    def test_error_of_balancing_is_a_failure_with_its_text(self, monkeypatch):
        def refuse(*_, **__):
            raise EffectError("Router 'x' is odd.")

        monkeypatch.setattr(Site, "record_", refuse)
        (result,) = verify_model(Layers(), run, checks=["zero_bias"])
        assert (result.status, result.detail) == ("failed", "EffectError: Router 'x' is odd.")


class TestWrongGates:
    def test_gates_of_the_unsteered_maximum_never_pass(self):
        (result,) = verify_model(Layers(AmaxGateRouter, top_k=1), run, checks=["unbiased_gates"])
        assert result.status == "failed"
        assert "layers.0.router" in result.detail

    def test_gates_of_another_ranking_are_steered_too(self):
        (result,) = verify_model(Layers(SortedGatesRouter, top_k=2), run, checks=["unbiased_gates"])
        assert result.status == "passed"

    def test_first_training_forward_refuses_what_would_fail(self):
        model = Layers(AmaxGateRouter, top_k=1)
        balance_(model)
        with pytest.raises(EffectError, match=r"router 'layers.0.router' depends on the bias beyond"):
            run(model)


class TestSkipped:
    def reason(self, name, model, call=run):
        (result,) = verify_model(model, call, checks=[name])
        assert result.status == "skipped"
        return result.detail

    def test_few_tokens_show_nothing_of_the_rule(self):
        few = self.reason("default_rule_balances", Layers(), lambda model: model(torch.ones(48, D)))
        assert "too few tokens" in few

    def test_all_experts_for_every_token_leave_nothing_to_move(self):
        assert "all experts" in self.reason("update_moves_bias", Layers(top_k=4))

    def test_model_that_cannot_be_pickled_cannot_be_balanced_so(self):
        model = Layers()
        model.unpicklable = lambda: None
        assert "cannot be pickled" in self.reason("pickle", model)

    def test_model_that_fails_in_bf16_is_named_so(self):
        class NoBf16(Layers):
            def forward(self, x_TD):
                return super().forward(x_TD.float())

        assert "bf16" in self.reason("bf16", NoBf16())
