from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_plugin.balancing.gaps import count_gaps_, gap_edges, gaps_of, new_gaps
from moe_plugin.balancing.rules import (
    PID,
    Adaptive,
    Load,
    Momentum,
    Multiplicative,
    PrimalDual,
    Proportional,
    Quantile,
    Rule,
    Sign,
)
from moe_plugin.errors import ConfigError
from tests.balancing.rules import slow_rules

BY_COUNT = [Sign, Proportional, Multiplicative, Momentum, PID, PrimalDual, Adaptive]
kinds = pytest.mark.parametrize("kind", BY_COUNT)
all_kinds = pytest.mark.parametrize("kind", [*BY_COUNT, Quantile])
counts_lists = st.lists(st.integers(0, 10**7), min_size=1, max_size=16)
often = settings(max_examples=200, deadline=None)


def load(counts, bias=None):
    counts_E = torch.as_tensor(counts, dtype=torch.int64)
    return Load(counts_E, torch.zeros(counts_E.shape, dtype=torch.float64) if bias is None else bias)


def step(rule, counts, rate=1.0, memory=None):
    return rule.step(load(counts), rate, {} if memory is None else memory)


def scored_load(scores_TE, bias_E, top_k):
    ids_TK = (scores_TE + bias_E).topk(top_k).indices
    counts_E = torch.bincount(ids_TK.flatten(), minlength=len(bias_E))
    gaps_EG = new_gaps(len(bias_E))
    with torch.enable_grad():
        count_gaps_(gaps_EG, gaps_of(scores_TE + bias_E, top_k))
    return Load(counts_E, bias_E, gaps_EG)


class TestAnyRule:
    @all_kinds
    def test_it_is_a_rule(self, kind):
        assert isinstance(kind(), Rule)

    @kinds
    @often
    @given(st.integers(0, 10**6), st.integers(1, 16))
    def test_balanced_counts_change_nothing(self, kind, count, experts):
        assert step(kind(), [count] * experts).tolist() == [0.0] * experts

    @kinds
    @often
    @given(counts_lists)
    def test_step_has_zero_mean(self, kind, counts):
        assert abs(step(kind(), counts).mean().item()) < 1e-12

    @kinds
    @often
    @given(counts_lists, st.randoms())
    def test_permuting_experts_permutes_the_step(self, kind, counts, random):
        order = random.sample(range(len(counts)), len(counts))
        permuted = step(kind(), [counts[i] for i in order])
        torch.testing.assert_close(permuted, step(kind(), counts)[order], rtol=1e-12, atol=1e-12)

    @kinds
    @often
    @given(counts_lists, st.integers(1, 1000))
    def test_scaling_counts_changes_nothing(self, kind, counts, factor):
        scaled = step(kind(), [factor * c for c in counts])
        torch.testing.assert_close(scaled, step(kind(), counts), rtol=1e-12, atol=1e-12)

    @kinds
    @often
    @given(st.integers(0, 10**7))
    def test_single_expert_never_moves(self, kind, count):
        assert step(kind(), [count]).tolist() == [0.0]

    @kinds
    def test_stacked_layers_equal_single_layers(self, kind):
        counts_LE = torch.randint(0, 100, (3, 8))
        stacked_LE = step(kind(), counts_LE)
        for layer in range(3):
            assert torch.equal(stacked_LE[layer], step(kind(), counts_LE[layer]))

    @kinds
    @pytest.mark.parametrize("rate", [-0.1, math.nan, math.inf, "abc", None, True])
    def test_bad_rate_is_refused(self, kind, rate):
        with pytest.raises(ConfigError, match="'rate' must be a number >= 0 or 'auto', got"):
            kind(rate=rate)

    @kinds
    def test_hundred_steps_equal_plain_python(self, kind):
        generator, rule = torch.Generator().manual_seed(1), PID(derivative=0.25) if kind is PID else kind()
        bias_E, memory, slow = (
            torch.zeros(12, dtype=torch.float64),
            {},
            getattr(slow_rules, kind.__name__)(12),
        )
        for number in range(100):
            counts_E = torch.randint(0, 10**6, (12,), generator=generator) ** (1 + number % 2)
            bias_E = bias_E + rule.step(Load(counts_E, bias_E), 0.01, memory)
            slow.update(counts_E.tolist(), 0.01)
            if kind is Sign:
                assert bias_E.tolist() == slow.bias
            assert bias_E.tolist() == pytest.approx(slow.bias, rel=0, abs=1e-12)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Proportional(limit=0), "'limit' must be a number > 0 or null, got 0"),
            (lambda: Momentum(kappa=0), "'kappa' must be a number > 0, got 0"),
            (lambda: Momentum(beta=1), "'beta' must be a number >= 0 and < 1, got 1"),
            (lambda: PID(integral=-1), "'integral' must be a number >= 0, got -1"),
            (lambda: PID(windup_limit=None), "'windup_limit' must be a number > 0, got None"),
            (lambda: PrimalDual(power=1.5), "'power' must be a number from 0 to 1, got 1.5"),
            (lambda: Adaptive(limit=0), "'limit' must be a number > 0, got 0"),
            (lambda: Adaptive(largest_gain=-1), "'largest_gain' must be a number > 0, got -1"),
            (lambda: Quantile(rate="auto"), "'rate' must be a number from 0 to 1, got 'auto'"),
        ],
    )
    def test_bad_numbers_are_refused(self, make, message):
        with pytest.raises(ConfigError, match=message):
            make()


class TestSign:
    def test_counts_beyond_float_precision_keep_their_sign(self):
        counts = [2**40, 2**40 + 1, 2**40 - 1]
        assert step(Sign(centred=False), counts).tolist() == [0.0, -1.0, 1.0]

    @often
    @given(counts_lists)
    def test_centred_rule_is_that_of_torchtitan(self, counts):
        """Float counts: coefficient times the sign of mean less count, then less the mean of that."""
        counts_E = torch.tensor(counts, dtype=torch.float64)
        delta_E = 0.001 * (counts_E.mean() - counts_E).sign()
        torch.testing.assert_close(step(Sign(), counts, 0.001), delta_E - delta_E.mean(), rtol=0, atol=1e-15)

    @often
    @given(counts_lists)
    def test_plain_rule_is_that_of_megatron_and_olmo(self, counts):
        """Megatron-LM: sum over E; OLMo-core: fp32 mean. Both: the sign of the mean less the count, times the rate."""
        counts_E = torch.tensor(counts, dtype=torch.float64)
        average = counts_E.sum(-1, keepdim=True) / counts_E.shape[-1]
        assert torch.equal(step(Sign(centred=False), counts, 0.001), (average - counts_E).sign() * 0.001)


class TestProportional:
    def test_limit_caps_the_error_of_a_collapsed_step(self):
        assert step(Proportional(limit=1.0), [40, 0, 0, 0]).tolist() == [-1.5, 0.5, 0.5, 0.5]


class TestMultiplicative:
    def test_factor_stays_positive(self):
        assert step(Multiplicative(), [10, 0], rate=100.0).isfinite().all()

    def test_bias_on_log_scores_selects_as_the_factor_does(self):
        scores_TE, factor_E = torch.rand(100, 8), torch.rand(8) + 0.5
        by_factor = (scores_TE * factor_E).topk(2).indices.sort().values
        assert torch.equal((scores_TE.log() + factor_E.log()).topk(2).indices.sort().values, by_factor)


class TestPrimalDual:
    def test_power_of_one_takes_steps_of_one_over_n(self):
        memory, rule = {}, PrimalDual(power=1.0)
        steps = [step(rule, [3, 1], memory=memory)[1].item() for _ in range(4)]
        assert steps == pytest.approx([0.5, 0.25, 0.5 / 3, 0.125])


class TestAdaptive:
    def test_errors_that_keep_their_sign_raise_the_gain_and_alternating_ones_lower_it(self):
        memory, rule = {}, Adaptive()
        for number in range(40):
            step(rule, [4, 2, 2 + 2 * (number % 2), 4 - 2 * (number % 2)], memory=memory)
        steady, alternating = memory["gain"][:2], memory["gain"][2:]
        assert steady.min() > 0.5
        assert alternating.max() < 0.01

    def test_largest_gain_is_never_exceeded(self):
        memory, rule = {}, Adaptive(largest_gain=0.001)
        assert step(rule, [3, 1], memory=memory).abs().max() == pytest.approx(0.001 * 0.5)

    def test_collapsed_expert_moves_as_one_with_twice_the_mean_error(self):
        assert step(Adaptive(), [100, 0, 0, 0])[0] == step(Adaptive(), [3, 0, 0, 0])[0]


class TestPID:
    def test_sum_stops_at_its_limit(self):
        memory, rule = {}, PID(derivative=0.0, integral=1.0, windup_limit=2.0)
        steps = [step(rule, [0, 2], memory=memory)[0].item() for _ in range(4)]
        assert steps == [2.0, 3.0, 3.0, 3.0]


class TestQuantile:
    @often
    @given(st.integers(2, 8), st.integers(1, 7), st.integers(1, 40), st.integers(0, 10**6))
    def test_step_equals_plain_python(self, experts, top_k, tokens, seed):
        generator = torch.Generator().manual_seed(seed)
        scores_TE = torch.randn(tokens, experts, generator=generator)
        load = scored_load(
            scores_TE, 0.3 * torch.randn(experts, generator=generator), min(top_k, experts - 1)
        )
        edges = gap_edges(torch.device("cpu")).double().tolist()
        expected = slow_rules.quantile_step(load.gaps_EG.tolist(), edges, load.expected_E.item())
        assert Quantile().step(load, 1.0, {}).tolist() == pytest.approx(expected, rel=0, abs=1e-12)

    @often
    @given(st.integers(2, 8), st.integers(1, 4))
    def test_balanced_load_changes_nothing(self, experts, rounds):
        scores_TE = torch.eye(experts).repeat(rounds, 1) + 0.01 * torch.rand(experts * rounds, experts)
        load = scored_load(scores_TE, torch.zeros(experts), 1)
        assert load.counts_E.tolist() == [rounds] * experts
        assert Quantile().step(load, 1.0, {}).tolist() == [0.0] * experts

    @often
    @given(st.integers(2, 8), st.integers(0, 10**6))
    def test_step_has_zero_mean(self, experts, seed):
        scores_TE = torch.randn(50, experts, generator=torch.Generator().manual_seed(seed))
        assert abs(Quantile().step(scored_load(scores_TE, torch.zeros(experts), 1), 1.0, {}).mean()) < 1e-12

    @pytest.mark.parametrize("scale", [0.003, 1.0, 3.0])
    def test_full_steps_balance_fixed_scores_of_any_scale(self, scale):
        torch.manual_seed(0)
        scores_TE, bias_E = scale * (torch.randn(4000, 16) + torch.randn(16)), torch.zeros(16)
        for _ in range(30):
            load = scored_load(scores_TE, bias_E, 2)
            bias_E += 0.5 * Quantile().step(load, 1.0, {}).float()
        counts_E = load.counts_E.double()
        assert counts_E.max() / counts_E.mean() - 1 < 0.03

    def test_expert_without_any_score_stays(self):
        scores_TE = torch.randn(50, 4)
        scores_TE[:, 2] = -torch.inf
        load = scored_load(scores_TE, torch.zeros(4), 1)
        assert load.gaps_EG[2].sum() == 0
        assert Quantile().step(load, 1.0, {}).isfinite().all()


class TestConvergence:
    @all_kinds
    def test_fixed_score_distribution_reaches_balance_within_range_over_rate(self, kind):
        torch.manual_seed(0)
        rate, tokens, offset_E = 2e-3, 8_000, 0.1 * torch.randn(16)
        bias_E, rule, memory = torch.zeros(16), kind(), {}
        rate_of_kind = {Quantile: 0.2, PrimalDual: 0.02, Adaptive: 0.1}.get(kind, rate)
        for _ in range(2 * int((offset_E.max() - offset_E.min()) / rate)):
            load = scored_load(0.5 + offset_E + 0.1 * torch.randn(tokens, 16), bias_E, 2)
            bias_E += rule.step(load, rate_of_kind, memory).float()
        mean = tokens * 2 / 16
        floor = math.sqrt(2 * math.log(16) * (1 - 2 / 16) / mean)
        assert (load.counts_E.max() - mean) / mean < 0.1 + floor
