from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_plugin.errors import ConfigError
from moe_plugin.metrics import max_violation
from moe_plugin.routing import LogSigmoid, Router, Sigmoid, SoftmaxAfterTopK
from moe_plugin.routing.rankings import Random, Sinkhorn, TokenHash, tell_tokens_


def router_with(ranking, score=None, experts=8, top_k=2):
    torch.manual_seed(0)
    return Router(16, experts, top_k, score=score or Sigmoid(), ranking=ranking)


def counts_of(routing, experts=8):
    return torch.bincount(routing.expert_ids_TK.flatten(), minlength=experts)


def slow_sinkhorn(scores, iterations):
    """The plan by alternate scaling of rows to 1 and of columns to T / E; probabilities, not logarithms."""
    plan = [[math.exp(score) for score in row] for row in scores]
    tokens, experts = len(plan), len(plan[0])
    for _ in range(iterations):
        plan = [[value / sum(row) for value in row] for row in plan]
        sums = [sum(row[e] for row in plan) for e in range(experts)]
        plan = [[row[e] * tokens / experts / sums[e] for e in range(experts)] for row in plan]
    return plan


class TestSinkhorn:
    @settings(max_examples=200, deadline=None)
    @given(st.integers(2, 8), st.integers(2, 5), st.integers(0, 10**6))
    def test_ranking_is_the_logarithm_of_the_plan_up_to_one_number_per_token(self, tokens, experts, seed):
        scores_TE = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
        ranked_TE = Sinkhorn(iterations=10)(scores_TE, scores_TE, training=True)
        expected_TE = torch.tensor(slow_sinkhorn(scores_TE.tolist(), 10)).log()
        difference_TE = ranked_TE - expected_TE
        torch.testing.assert_close(
            difference_TE, difference_TE[:, :1].expand_as(difference_TE), rtol=0, atol=1e-4
        )

    def test_training_batch_is_nearly_even_and_evaluation_ranks_scores(self):
        router, x_TD = router_with(Sinkhorn(), SoftmaxAfterTopK()), torch.randn(2000, 16) + 1
        plain = router_with(None, SoftmaxAfterTopK())(x_TD)
        even = max_violation(counts_of(router(x_TD)))
        assert even < 0.5 < max_violation(counts_of(plain))
        assert torch.equal(router.eval()(x_TD).expert_ids_TK, plain.expert_ids_TK)

    def test_no_tokens_are_no_trouble(self):
        assert router_with(Sinkhorn())(torch.randn(0, 16)).expert_ids_TK.shape == (0, 2)

    @pytest.mark.parametrize(
        ("numbers", "message"),
        [
            ({"iterations": 0}, "'iterations' must be an integer >= 1, got 0"),
            ({"iterations": 1.5}, "'iterations' must be an integer >= 1, got 1.5"),
            ({"temperature": 0.0}, "'temperature' must be a number > 0, got 0.0"),
            ({"temperature": math.inf}, "'temperature' must be a number > 0, got inf"),
        ],
    )
    def test_bad_numbers_are_refused(self, numbers, message):
        with pytest.raises(ConfigError, match=message):
            Sinkhorn(**numbers)


class TestRandom:
    def test_load_is_even_up_to_chance(self):
        counts_E = counts_of(router_with(Random())(torch.randn(20_000, 16) + 3))
        assert (counts_E - 5000).abs().max() < 5 * math.sqrt(5000)

    def test_same_hidden_states_draw_the_same_and_others_do_not(self):
        router, x_TD = router_with(Random()), torch.randn(500, 16)
        first = router(x_TD).expert_ids_TK
        assert torch.equal(router(x_TD).expert_ids_TK, first)
        changed = router(x_TD + 1e-5).expert_ids_TK
        assert (changed != first).float().mean() > 0.5

    def test_gate_weights_are_those_of_the_scores(self):
        routing = router_with(Random())(torch.randn(50, 16))
        assert torch.equal(routing.weights_TK, routing.scores_TE.gather(1, routing.expert_ids_TK))

    def test_pairs_of_experts_are_all_about_as_frequent(self):
        ids_TK = router_with(Random(), experts=4)(torch.randn(12_000, 16)).expert_ids_TK.sort().values
        pairs = torch.bincount(ids_TK[:, 0] * 4 + ids_TK[:, 1])
        assert (pairs[pairs > 0] - 2000).abs().max() < 5 * math.sqrt(2000)


class TestTokenHash:
    def test_equal_ids_have_equal_experts_whatever_the_hidden_state(self):
        router = router_with(TokenHash())
        tell_tokens_(router, torch.tensor([[3, 7, 3], [9, 3, 7]]))
        ids_TK = router(torch.randn(6, 16)).expert_ids_TK
        assert torch.equal(ids_TK[[0, 2]], ids_TK[[4, 4]])
        assert torch.equal(ids_TK[1], ids_TK[5])

    def test_vocabulary_is_spread_evenly(self):
        router = router_with(TokenHash())
        tell_tokens_(router, torch.arange(20_000)[None])
        counts_E = counts_of(router(torch.randn(20_000, 16)))
        assert (counts_E - 5000).abs().max() < 5 * math.sqrt(5000)

    def test_network_that_tells_no_ids_is_an_error(self):
        message = r"'ranking' needs the ids of 6 tokens for TokenHash, got 0\. Call tell_tokens_ before"
        with pytest.raises(ConfigError, match=message):
            router_with(TokenHash())(torch.randn(6, 16))


class TestLogSigmoid:
    def test_it_routes_and_weighs_as_sigmoid_does(self):
        x_TD = torch.randn(100, 16)
        plain, logs = router_with(None)(x_TD), router_with(None, LogSigmoid())(x_TD)
        assert torch.equal(plain.expert_ids_TK, logs.expert_ids_TK)
        torch.testing.assert_close(plain.weights_TK, logs.weights_TK)
        torch.testing.assert_close(
            Sigmoid().probabilities(plain.scores_TE), LogSigmoid().probabilities(logs.scores_TE)
        )
