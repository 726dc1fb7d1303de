from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_plugin.balancing.calibrate import solve_bias

INF = float("inf")


def loads(scores_TE, top_k, bias_E):
    """Tokens per expert, token by token."""
    counts = [0] * len(bias_E)
    for row in (scores_TE.double() + bias_E.double()).tolist():
        for expert in sorted(range(len(row)), key=lambda e: -row[e])[:top_k]:
            counts[expert] += 1
    return counts


def least_load_of_grid(scores_TE, top_k, steps=21):
    """The smallest maximal load that any bias on a grid reaches, the first expert's at zero."""
    grid = torch.linspace(-1.5, 1.5, steps).tolist()
    others = scores_TE.shape[1] - 1
    biases = (torch.tensor([0.0, *rest]) for rest in itertools.product(grid, repeat=others))
    return min(max(loads(scores_TE, top_k, bias_E)) for bias_E in biases)


def skewed(num_tokens, num_experts, seed=0, skew=1.0):
    random = torch.Generator().manual_seed(seed)
    skew_E = skew * torch.randn(num_experts, generator=random)
    return torch.randn(num_tokens, num_experts, generator=random) + skew_E


class TestSolveBias:
    @pytest.mark.parametrize(("num_experts", "top_k"), [(2, 1), (3, 1), (3, 2)])
    @pytest.mark.parametrize("seed", range(3))
    def test_small_cases_are_as_balanced_as_any_bias_of_a_grid(self, num_experts, top_k, seed):
        scores_TE = skewed(12, num_experts, seed, skew=0.5).sigmoid()
        bias_E = solve_bias(scores_TE, top_k, torch.zeros(num_experts))
        assert max(loads(scores_TE, top_k, bias_E)) <= least_load_of_grid(scores_TE, top_k) + 1

    @pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (64, 8), (32, 1)])
    @pytest.mark.parametrize("score", [torch.sigmoid, lambda x: x.softmax(-1), lambda x: 20 * x])
    def test_every_load_is_the_mean_within_one_percent(self, num_experts, top_k, score):
        scores_TE = score(skewed(2048, num_experts))
        bias_E = solve_bias(scores_TE, top_k, torch.zeros(num_experts))
        share = 2048 * top_k / num_experts
        assert max(loads(scores_TE, top_k, bias_E)) <= 1.01 * share + 1
        assert bias_E.mean().abs() < 1e-6 * bias_E.abs().max()

    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 10**6), shift=st.floats(-3, 3))
    def test_start_and_a_constant_do_not_matter_and_it_is_deterministic(self, seed, shift):
        scores_TE = skewed(256, 4, seed)
        bias_E = solve_bias(scores_TE, 2, torch.zeros(4))
        assert torch.equal(bias_E, solve_bias(scores_TE, 2, torch.zeros(4)))
        for other_E in (
            solve_bias(scores_TE, 2, torch.full((4,), shift)),
            solve_bias(scores_TE, 2, 0.1 * scores_TE[0]),
        ):
            assert max(loads(scores_TE, 2, other_E)) <= 256 * 2 / 4 * 1.03 + 1
            assert abs(other_E.mean()) < 1e-5

    def test_bfloat16_scores_are_solved_in_fp32(self):
        scores_TE = skewed(512, 4).bfloat16()
        assert solve_bias(scores_TE, 1, torch.zeros(4)).dtype == torch.float32

    def test_expert_masked_for_all_shares_nothing_and_is_not_moved(self):
        scores_TE = skewed(1000, 5)
        scores_TE[:, 2] = -INF
        bias_E = solve_bias(scores_TE, 2, torch.zeros(5))
        counts = loads(scores_TE, 2, bias_E)
        assert counts[2] == 0
        assert max(counts) <= 1000 * 2 / 4 * 1.01 + 1
        assert bias_E.isfinite().all()

    def test_experts_masked_for_some_tokens_are_balanced_over_the_others(self):
        scores_TE = skewed(1200, 6)
        group_T = torch.arange(1200) % 2
        scores_TE[group_T == 0, :3] = -INF
        scores_TE[group_T == 1, 3:] = -INF
        bias_E = solve_bias(scores_TE, 2, torch.zeros(6))
        assert max(loads(scores_TE, 2, bias_E)) <= 1200 * 2 / 6 * 1.01 + 1

    def test_groups_apart_are_balanced_each_by_itself(self):
        scores_TE = skewed(1000, 8)
        scores_TE[:900, 4:] = -INF
        scores_TE[900:, :4] = -INF
        counts = loads(scores_TE, 2, solve_bias(scores_TE, 2, torch.zeros(8)))
        assert max(counts[:4]) <= 900 * 2 / 4 * 1.01 + 1
        assert max(counts[4:]) <= 100 * 2 / 4 * 1.01 + 1

    def test_tokens_with_as_many_open_experts_as_they_take_are_no_trouble(self):
        scores_TE = skewed(600, 4)
        scores_TE[:300, 2:] = -INF
        bias_E = solve_bias(scores_TE, 2, torch.zeros(4))
        assert bias_E.isfinite().all()
        assert max(loads(scores_TE, 2, bias_E)) <= 600 * 2 / 4 * 1.01 + 1

    def test_nan_scores_are_masked(self):
        scores_TE = skewed(200, 4)
        scores_TE[0] = torch.nan
        assert solve_bias(scores_TE, 1, torch.zeros(4)).isfinite().all()

    @pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(0, 4, 2), (10, 4, 4), (10, 1, 1)])
    def test_nothing_to_solve_gives_the_start(self, num_tokens, num_experts, top_k):
        start_E = torch.arange(num_experts, dtype=torch.float32)
        bias_E = solve_bias(torch.zeros(num_tokens, num_experts), top_k, start_E)
        assert torch.equal(bias_E, start_E)
        assert bias_E is not start_E
