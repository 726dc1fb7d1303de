from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moe_plugin.attach.balance import balance_
from moe_plugin.attach.balanced_model import find_balanced
from moe_plugin.balancing.rate import AUTO_FRACTION
from moe_plugin.balancing.rules import PID, Adaptive, Load, Momentum, PrimalDual, Proportional, Quantile, Sign
from moe_plugin.balancing.schedule import RateSchedule
from moe_plugin.errors import AttachError, CheckpointError, EffectError
from moe_plugin.routing import Router
from moe_plugin.routing.scores import Sigmoid
from tests.hosts import GroupedRouter, Host, OwningRouter, SoftmaxRouter


class OurRouter(Router):
    """Our own router, returning what the test host expects."""

    def __init__(self, dim, num_experts, top_k):
        super().__init__(dim, num_experts, top_k, score=Sigmoid())

    def forward(self, x_TD):
        routing = super().forward(x_TD)
        return routing.weights_TK, routing.expert_ids_TK


ROUTERS = [SoftmaxRouter, GroupedRouter, OwningRouter, OurRouter]
routers = pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.__name__)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tokens(batch=3, length=7):
    return torch.randint(0, 32, (batch, length))


def sign_step(counts_E, rate):
    return Sign().step(Load(counts_E, torch.zeros(len(counts_E))), rate, {}).float()


def train_step(model, x):
    loss = model(x).square().mean()
    loss.backward()
    return loss


def gradients(model):
    return {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


class TestZeroBias:
    @routers
    def test_outputs_and_gradients_are_bit_identical(self, router):
        model = Host(router)
        untouched = copy.deepcopy(model)
        balance_(model)
        x = tokens()
        assert torch.equal(train_step(model, x), train_step(untouched, x))
        assert gradients(model).keys() == gradients(untouched).keys()
        assert all(torch.equal(grad, gradients(untouched)[name]) for name, grad in gradients(model).items())

    @routers
    def test_state_dict_keys_are_unchanged(self, router):
        model = Host(router)
        keys = list(model.state_dict())
        balance_(model)
        assert list(model.state_dict()) == keys

    @routers
    def test_remove_restores_the_model(self, router):
        model = Host(router)
        before = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
        balance_(model).remove()
        assert {name: (type(module), set(vars(module))) for name, module in model.named_modules()} == before
        assert find_balanced(model) is None
        assert not model._forward_pre_hooks
        assert not model._forward_hooks


class TestBias:
    @routers
    def test_large_bias_draws_every_token_with_unbiased_gate_weights(self, router):
        model = Host(router, top_k=1)
        balanced = balance_(model)
        site = balanced["layers.0.router"]
        site.bias.copy_(torch.tensor([0.0, 0.0, 5.0, 0.0]))
        x_TD = torch.randn(50, 8)
        weights_TK, ids_TK = model.layers[0].router(x_TD)
        if router is GroupedRouter:  # a bias must not leave the chosen group, here experts 0-1 or 2-3
            scores_TE = (x_TD @ site.router.weight.T).softmax(-1)
            in_second_group_T = scores_TE.argmax(-1) >= 2
            assert torch.equal(ids_TK.flatten() == 2, in_second_group_T)
            assert torch.equal(weights_TK, scores_TE.gather(1, ids_TK))
            return
        assert ids_TK.unique().tolist() == [2]
        logits_TE = x_TD @ site.router.weight.T
        expected_T = torch.ones(50) if router is SoftmaxRouter else logits_TE.sigmoid()[:, 2]
        torch.testing.assert_close(weights_TK.flatten(), expected_T)

    @routers
    def test_no_gradient_reaches_the_bias(self, router):
        model = Host(router)
        balanced = balance_(model)
        train_step(model, tokens())
        assert all(site.bias_place.tensor().grad is None for site in balanced.values())

    @settings(max_examples=30, deadline=None)
    @given(st.floats(-2, 2), st.sampled_from([SoftmaxRouter, OwningRouter, OurRouter]))
    def test_one_constant_on_all_biases_changes_no_selection(self, constant, router):
        model = Host(router)
        balanced = balance_(model)
        site = balanced["layers.0.router"]
        x_TD = torch.randn(20, 8)
        before = model.layers[0].router(x_TD)[1]
        site.bias.fill_(round(constant * 8) / 8)
        assert torch.equal(model.layers[0].router(x_TD)[1], before)

    def test_groups_masked_by_zeros_stay_closed_under_negative_bias(self):
        model = Host(GroupedRouter)
        site = balance_(model)["layers.0.router"]
        site.bias.copy_(torch.tensor([-3.0, -3.0, 0.0, 0.0]))
        x_TD = torch.randn(200, 8)
        groups_TK = model.layers[0].router(x_TD)[1] // 2
        assert torch.equal(groups_TK[:, 0], groups_TK[:, 1])

    @routers
    @pytest.mark.parametrize(
        "cast", [nn.Module.bfloat16, nn.Module.half, lambda model: model.to(torch.bfloat16)]
    )
    def test_cast_keeps_the_bias_in_fp32_with_its_value(self, router, cast):
        model = Host(router)
        balanced = balance_(model)
        value_E = torch.tensor([0.5 + 0.001, -0.1, 0.2, 0.3])
        balanced["layers.1.router"].bias.copy_(value_E)
        cast(model)
        assert balanced["layers.1.router"].bias.dtype == torch.float32
        assert torch.equal(balanced["layers.1.router"].bias, value_E)
        assert model.head.weight.dtype != torch.float32

    @routers
    def test_model_made_on_meta_device_starts_with_zero_bias(self, router):
        with torch.device("meta"):
            model = Host(router)
        balanced = balance_(model)
        model.to_empty(device="cpu")
        assert all(site.bias.tolist() == [0.0] * 4 for site in balanced.values())

    @routers
    def test_copies_and_pickles_select_alike_and_count_apart(self, router):
        model = Host(router)
        balanced = balance_(model)
        balanced["layers.0.router"].bias.copy_(torch.tensor([0.3, -0.3, 0.1, 0.0]))
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        x = tokens()
        for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            assert torch.equal(other(x), model(x))
            other_balanced = find_balanced(other)
            assert other_balanced is not None
            assert other_balanced["layers.0.router"].counts.sum() == 2 * x.numel()
            assert isinstance(other.layers[0].router, router)
            balanced.discard_counts_()


class TestCounts:
    @routers
    def test_counts_equal_tokens_times_k(self, router):
        model = Host(router)
        balanced = balance_(model)
        x = tokens()
        train_step(model, x)
        for site, layer in zip(balanced.values(), model.layers, strict=True):
            assert site.counts.sum() == 2 * x.numel()
            assert site.counts.dtype == torch.int64
            assert layer.router is site.router

    def test_padding_does_not_count(self):
        model = Host()
        balanced = balance_(model)
        x = tokens(2, 5)
        mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
        model(x, attention_mask=mask)
        site = balanced["layers.0.router"]
        real_D = model.embedding(x)[mask.bool()]
        expected = torch.bincount(site.router(real_D)[1].flatten(), minlength=4)
        assert site.counts.tolist() == (2 * expected).tolist()  # the second call saw the real tokens only
        model(x)
        assert site.counts.sum() == 2 * 4 * 2 + 2 * 10  # a forward without a mask counts every token

    def test_mask_of_a_longer_past_counts_the_last_tokens(self):
        model = Host()
        site = balance_(model)["layers.0.router"]
        model(tokens(2, 1), attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]))
        assert site.counts.sum() == 2

    def test_mask_of_other_tokens_is_an_error(self):
        model = Host()
        balance_(model)
        with pytest.raises(
            EffectError, match=r"'attention_mask' has shape \(2, 3\), but router 'layers.0.router'"
        ):
            model(tokens(2, 5), attention_mask=torch.ones(2, 3))

    def test_evaluation_counts_apart(self):
        model = Host()
        site = balance_(model)["layers.0.router"]
        model.eval()
        model(tokens(1, 6))
        assert site.counts.sum() == 0
        assert site.eval_counts.sum() == 12

    def test_no_grad_in_training_counts_nothing(self):
        model = Host()
        site = balance_(model)["layers.0.router"]
        with torch.no_grad():
            model(tokens())
        assert site.counts.sum() == 0

    @routers
    def test_compiled_fullgraph_counts_and_does_not_recompile_when_bias_moves(self, router):
        model = Host(router)
        balanced = balance_(model, Sign(rate=0.1))
        x = tokens()
        train_step(model, x)
        balanced.update()
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(3):
                torch.testing.assert_close(compiled(x), model(x))
                balanced.discard_counts_()
                compiled(x).sum().backward()
                assert balanced["layers.1.router"].counts.sum() == 2 * x.numel()
                balanced.update()


class TestUpdate:
    @routers
    def test_sign_rule_moves_every_bias_against_its_load(self, router):
        model = Host(router)
        balanced = balance_(model, Sign(rate=0.125))
        train_step(model, tokens())
        counts = {name: site.counts.clone() for name, site in balanced.items()}
        record = balanced.update()
        for name, site in balanced.items():
            assert torch.equal(record.counts[name], counts[name])
            assert torch.equal(site.bias, sign_step(counts[name], 0.125))
            assert site.counts.sum() == 0
        assert balanced.record is record
        assert record.step == 1

    def test_observing_moves_nothing(self):
        model = Host(OwningRouter)
        balanced = balance_(model, rule=None)
        train_step(model, tokens())
        record = balanced.update()
        assert record.counts["layers.0.router"].sum() == 42
        assert all(site.bias.tolist() == [0.0] * 4 for site in balanced.values())

    def test_auto_rate_is_relative_to_the_score_spread(self):
        for scale in (1.0, 0.01):
            model, x = Host(OwningRouter), tokens()
            with torch.no_grad():
                weight_ED = model.layers[0].router.weight.mul_(scale)
                scores_TE = (model.embedding(x).flatten(0, 1) @ weight_ED.T).sigmoid()
            balanced = balance_(model)
            train_step(model, x)
            load = Load(balanced.update().counts["layers.0.router"], torch.zeros(4))
            rate = AUTO_FRACTION * scores_TE.std(-1, correction=0).mean().item()
            step_E = Proportional().step(load, rate, {}).float()
            torch.testing.assert_close(balanced["layers.0.router"].bias, step_E, rtol=1e-4, atol=1e-8)

    def test_schedule_scales_the_step(self):
        model = Host()
        balanced = balance_(model, Sign(rate=1.0), schedule=RateSchedule(warmup_steps=4, freeze_after=1))
        train_step(model, tokens())
        step_E = sign_step(balanced["layers.0.router"].counts, 0.25)
        balanced.update()
        assert torch.equal(balanced["layers.0.router"].bias, step_E)
        train_step(model, tokens())
        balanced.update()
        assert torch.equal(balanced["layers.0.router"].bias, step_E)

    @pytest.mark.parametrize("rule", [Sign(rate=0.1), Proportional(rate=0.1)])
    def test_non_finite_step_moves_nothing(self, rule):
        model = Host()
        balanced = balance_(model, rule)
        train_step(model, tokens())
        balanced.reject_if_(torch.tensor(torch.nan).isnan())
        record = balanced.update()
        assert record.counts["layers.0.router"].sum() == 0
        assert all(site.bias.tolist() == [0.0] * 4 for site in balanced.values())

    def test_nan_scores_move_nothing(self):
        model = Host()
        balanced = balance_(model, Sign(rate=0.1))
        with torch.no_grad():
            model.embedding.weight[3] = torch.nan
        model(torch.full((1, 4), 3))
        balanced.update()
        assert all(site.bias.tolist() == [0.0] * 4 for site in balanced.values())

    def test_step_of_padding_only_moves_nothing(self):
        model = Host()
        balanced = balance_(model, Proportional(rate=0.1))
        model(tokens(1, 4), attention_mask=torch.zeros(1, 4))
        balanced.update()
        assert all(site.bias.tolist() == [0.0] * 4 for site in balanced.values())

    @pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 4)])
    def test_no_choice_of_experts_keeps_bias_at_zero(self, num_experts, top_k):
        model = Host(num_experts=num_experts, top_k=top_k)
        balanced = balance_(model)
        train_step(model, tokens())
        balanced.update()
        assert all(site.bias.tolist() == [0.0] * num_experts for site in balanced.values())

    def test_rules_by_glob_apply_to_their_layer(self):
        model = Host()
        balanced = balance_(model, {"layers.0.*": Sign(rate=0.1), "*": Sign(rate=0.0)})
        train_step(model, tokens())
        balanced.update()
        step_E = sign_step(balanced.record.counts["layers.0.router"], 0.1)
        assert torch.equal(balanced["layers.0.router"].bias, step_E)
        assert balanced["layers.1.router"].bias.tolist() == [0.0] * 4

    def test_accumulated_batches_equal_one_large_batch(self):
        x, biases = tokens(4, 8), []
        for parts in (1, 2, 4):
            torch.manual_seed(0)
            model = Host()
            balanced = balance_(model, Sign(rate=0.1))
            for part in x.chunk(parts):
                train_step(model, part)
            balanced.update()
            biases.append([site.bias.tolist() for site in balanced.values()])
        assert biases[0] == biases[1] == biases[2]


class TestProofOfEffect:
    def test_model_without_router_is_an_error(self):
        with pytest.raises(AttachError, match="No router was found in Sequential"):
            balance_(nn.Sequential(nn.Linear(2, 2)))

    def test_training_in_eval_mode_is_an_error(self):
        model = Host().eval()
        balanced = balance_(model)
        model(tokens())
        with pytest.raises(EffectError, match=r"'layers.0.router' counted no tokens in the first step"):
            balanced.update()

    def test_router_that_selects_otherwise_is_an_error(self):
        class OddRouter(SoftmaxRouter):
            def forward(self, x_TD):
                return torch.topk((x_TD @ self.weight.T).softmax(-1), self.top_k + 1)

        model = Host(OddRouter)
        balance_(model)
        with pytest.raises(
            EffectError, match=r"'layers.0.router' must select 2 experts, .* its forward selects 3 experts"
        ):
            model(tokens())

    def test_balancing_again_returns_the_same_object(self):
        model = Host()
        assert balance_(model) is balance_(model)

    def test_balancing_again_with_other_settings_is_an_error(self):
        model = Host()
        balance_(model)
        with pytest.raises(AttachError, match="balanced already with other settings"):
            balance_(model, Sign(rate=0.5))

    def test_balancing_a_part_twice_is_an_error(self):
        model = Host()
        balance_(model.layers[0])
        with pytest.raises(AttachError, match=r"'layers.0' inside the model is balanced already"):
            balance_(model)


class TestSites:
    @pytest.mark.parametrize("sites", ["layers.1.*", ["layers.1.router"], lambda name: "1" in name])
    def test_choice_attaches_to_those_only(self, sites):
        assert list(balance_(Host(), sites=sites)) == ["layers.1.router"]

    def test_choice_that_matches_nothing_is_an_error(self):
        with pytest.raises(
            AttachError, match=r"'sites' must match a router, got 'x\*'; there are \['layers.0.router'"
        ):
            balance_(Host(), sites="x*")

    def test_each_glob_must_match(self):
        with pytest.raises(AttachError, match=r"'sites' must match a router, got \['typo\*'\]; there are \["):
            balance_(Host(), sites=["layers.0*", "typo*"])

    def test_rules_that_leave_a_router_out_change_nothing(self):
        model = Host()
        with pytest.raises(
            AttachError, match=r"'rule' must have a glob that matches router 'layers.1.router'"
        ):
            balance_(model, {"layers.0.*": Sign()})
        assert type(model.layers[0].router) is SoftmaxRouter


class TestState:
    def trained(self, router=SoftmaxRouter, **sizes):
        model = Host(router, **sizes)
        balanced = balance_(model, Sign(rate=0.1))
        train_step(model, tokens())
        balanced.update()
        return balanced

    @routers
    def test_save_and_load_continue_exactly(self, router, tmp_path):
        balanced = self.trained(router)
        balanced.save(tmp_path / "bias.safetensors")
        other = balance_(Host(router), Sign(rate=0.1))
        other.load(tmp_path / "bias.safetensors")
        assert other.step == 1
        for name, site in balanced.items():
            assert torch.equal(other[name].bias, site.bias)

    def test_other_number_of_experts_is_an_error_with_both_numbers(self):
        state = self.trained().state_dict()
        message = "layers.0.router: 4 experts in the checkpoint, 8 in the model; layers.1"
        with pytest.raises(CheckpointError, match=message):
            balance_(Host(num_experts=8)).load_state_dict(state)

    def test_other_sites_are_an_error(self):
        state = self.trained().state_dict()
        with pytest.raises(CheckpointError, match="The checkpoint balances"):
            balance_(Host(), sites="layers.0.*").load_state_dict(state)


MEMORIES = [Momentum(rate=0.1), PID(rate=0.1), PrimalDual(rate=0.1), Quantile(), Adaptive(rate=0.1)]


@pytest.mark.parametrize("rule", MEMORIES, ids=lambda rule: type(rule).__name__)
class TestMemory:
    @staticmethod
    def run(balanced, steps):
        model = balanced._model
        for step in steps:
            torch.manual_seed(100 + step)
            train_step(model, tokens())
            balanced.update()
        return [site.bias.tolist() for site in balanced.values()]

    def test_resumed_rule_continues_exactly(self, rule, tmp_path):
        first = balance_(Host(), rule)
        twin = balance_(copy.deepcopy(first._model), rule)
        whole = self.run(twin, range(4))
        self.run(first, range(2))
        first.save(tmp_path / "bias.safetensors")
        resumed = balance_(copy.deepcopy(first._model), rule)
        resumed.load(tmp_path / "bias.safetensors")
        assert self.run(resumed, range(2, 4)) == whole

    def test_rejected_step_leaves_no_trace(self, rule):
        balanced = balance_(Host(), rule)
        twin = balance_(copy.deepcopy(balanced._model), rule)
        self.run(balanced, range(2))
        balanced.reject_if_(torch.tensor(True))
        self.run(balanced, [7])
        assert self.run(balanced, [2]) == self.run(twin, range(3))

    @pytest.mark.parametrize("parts", [2, 4])
    def test_accumulation_changes_nothing(self, rule, parts):
        balanced = balance_(Host(), rule)
        twin = balance_(copy.deepcopy(balanced._model), rule)
        for _ in range(3):
            x = tokens(4, 8)
            train_step(balanced._model, x)
            for part in x.chunk(parts):
                train_step(twin._model, part)
            balanced.update(), twin.update()
        assert [s.bias.tolist() for s in balanced.values()] == [s.bias.tolist() for s in twin.values()]


def ranks_update(rank, results, split, rule):
    torch.manual_seed(0)
    model = Host()
    balanced = balance_(model, rule)
    for step in range(3):
        torch.manual_seed(10 + step)
        x = tokens(4, 8)
        part = x.split(split)[rank]
        if len(part):
            train_step(model, part)
        else:
            train_step(model, x[:1])
            balanced.discard_counts_()
            for site in balanced.values():
                site.counters.training.slots_S[4 + 1] += 1  # E + 1: a selection was seen, but masked
        balanced.update()
    results[rank] = [site.bias.tolist() for site in balanced.values()]


class TestRanks:
    @pytest.mark.parametrize(
        "rule", [Sign(rate=0.1), Momentum(), Quantile()], ids=lambda rule: type(rule).__name__
    )
    @pytest.mark.parametrize("split", [[2, 2], [1, 3], [0, 4]])
    def test_any_split_over_ranks_equals_one_process(self, rule, split, on_ranks):
        alone: dict = {}
        ranks_update(0, alone, [4], rule)
        results = on_ranks(2, ranks_update, split, rule)
        assert results[0] == results[1] == alone[0]
