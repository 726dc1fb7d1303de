from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_plugin.balancing.rules import Proportional, Rule, Sign
from moe_plugin.errors import ConfigError

counts_lists = st.lists(st.integers(0, 10**7), min_size=1, max_size=16)
rules = pytest.mark.parametrize("rule", [Sign(), Proportional()], ids=lambda rule: type(rule).__name__)


def direction(rule, counts):
    return rule.direction(torch.tensor(counts, dtype=torch.int64), {})


def slow_signs(counts):
    mean = Fraction(sum(counts), len(counts))
    signs = [(mean > c) - (mean < c) for c in counts]
    return [float(torch.tensor(sign) - torch.tensor(sum(signs)) / len(signs)) for sign in signs]


class TestAnyRule:
    @rules
    def test_it_is_a_rule(self, rule):
        assert isinstance(rule, Rule)

    @rules
    @settings(max_examples=200, deadline=None)
    @given(st.integers(0, 10**6), st.integers(1, 16))
    def test_balanced_counts_change_nothing(self, rule, count, experts):
        assert direction(rule, [count] * experts).tolist() == [0.0] * experts

    @rules
    @settings(max_examples=200, deadline=None)
    @given(counts_lists)
    def test_direction_has_zero_mean(self, rule, counts):
        assert abs(direction(rule, counts).mean().item()) < 1e-5

    @rules
    @settings(max_examples=200, deadline=None)
    @given(counts_lists, st.randoms())
    def test_permuting_experts_permutes_direction(self, rule, counts, random):
        order = random.sample(range(len(counts)), len(counts))
        permuted = direction(rule, [counts[i] for i in order])
        torch.testing.assert_close(permuted, direction(rule, counts)[order], rtol=1e-6, atol=1e-6)

    @rules
    @settings(max_examples=200, deadline=None)
    @given(counts_lists, st.integers(1, 1000))
    def test_scaling_counts_changes_nothing(self, rule, counts, factor):
        scaled = direction(rule, [factor * c for c in counts])
        torch.testing.assert_close(scaled, direction(rule, counts), rtol=1e-6, atol=1e-6)

    @rules
    def test_stacked_layers_equal_single_layers(self, rule):
        counts_LE = torch.randint(0, 100, (3, 8))
        stacked_LE = rule.direction(counts_LE, {})
        for layer in range(3):
            assert torch.equal(stacked_LE[layer], rule.direction(counts_LE[layer], {}))

    @pytest.mark.parametrize("kind", [Sign, Proportional])
    @pytest.mark.parametrize("rate", [-0.1, math.nan, math.inf, "abc", None, True])
    def test_bad_rate_is_refused(self, kind, rate):
        with pytest.raises(ConfigError, match="'rate' must be a number >= 0 or 'auto', got"):
            kind(rate=rate)


class TestSign:
    @settings(max_examples=200, deadline=None)
    @given(counts_lists)
    def test_any_counts_equal_exact_fractions(self, counts):
        assert direction(Sign(), counts).tolist() == slow_signs(counts)

    def test_counts_beyond_float_precision_keep_their_sign(self):
        counts = [2**40, 2**40 + 1, 2**40 - 1]
        assert direction(Sign(centred=False), counts).tolist() == [0.0, -1.0, 1.0]


class TestProportional:
    @settings(max_examples=200, deadline=None)
    @given(counts_lists)
    def test_any_counts_equal_exact_fractions(self, counts):
        mean = Fraction(sum(counts), len(counts))
        expected = [float((mean - c) / mean) if mean else 0.0 for c in counts]
        assert direction(Proportional(), counts).tolist() == pytest.approx(expected, abs=1e-5, rel=1e-6)

    def test_limit_caps_the_error_of_a_collapsed_step(self):
        assert direction(Proportional(limit=1.0), [40, 0, 0, 0]).tolist() == [-1.5, 0.5, 0.5, 0.5]

    def test_bad_limit_is_refused(self):
        with pytest.raises(ConfigError, match="'limit' must be a number > 0 or null, got 0"):
            Proportional(limit=0)


class TestSignConverges:
    @pytest.mark.parametrize(("num_experts", "top_k"), [(16, 2), (64, 4)])
    def test_fixed_scores_reach_balance_within_range_over_rate(self, num_experts, top_k):
        torch.manual_seed(0)
        rate, tokens, offset_E = 1e-3, 20_000, 0.1 * torch.randn(num_experts)
        bias_E = torch.zeros(num_experts)
        rule = Sign(rate=rate)
        steps = int((offset_E.max() - offset_E.min()) / rate)
        for _ in range(steps):
            scores_TE = 0.5 + offset_E + 0.1 * torch.randn(tokens, num_experts)
            ids_TK = (scores_TE + bias_E).topk(top_k).indices
            counts_E = torch.bincount(ids_TK.flatten(), minlength=num_experts)
            bias_E += rate * rule.direction(counts_E, {})
        mean = tokens * top_k / num_experts
        floor = math.sqrt(
            2 * math.log(num_experts) * (1 - top_k / num_experts) * num_experts / (tokens * top_k)
        )
        assert (counts_E.max() - mean) / mean < 0.1 + floor
