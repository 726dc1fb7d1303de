"""Routers whose tokens use different numbers of experts, against plain Python."""

from __future__ import annotations

import copy

import pytest
import torch

from moe_plugin.errors import ConfigError
from moe_plugin.routing import DynamicRouter, Sigmoid, SoftmaxAfterTopK, SoftmaxBeforeTopK, Threshold, TopP

NUM_EXPERTS, MAX_K = 6, 4


def dynamic(score, cut, **settings):
    torch.manual_seed(0)
    router = DynamicRouter(8, NUM_EXPERTS, 2, score=score, cut=cut, **{"max_k": MAX_K} | settings)
    router.weight.data.mul_(4)
    router.expert_bias.normal_(0, 0.1)
    return router


def slow_top_p(router, scores_E):
    """Take the best experts until they hold the share p of all scores."""
    biased = [score + bias for score, bias in zip(scores_E, router.expert_bias.tolist(), strict=True)]
    order = sorted(range(NUM_EXPERTS), key=lambda expert: -biased[expert])[:MAX_K]
    used, held = [], 0.0
    for expert in order:
        if len(used) < router.min_k or held < router.level.item():
            used.append(expert)
            held += scores_E[expert] / sum(scores_E)
    return used


def slow_threshold(router, scores_E):
    """Take every expert above its threshold, but at most the best four."""
    above = {
        expert: score + bias
        for expert, (score, bias) in enumerate(zip(scores_E, router.expert_bias.tolist(), strict=True))
        if score > -router.level.item() - bias
    }
    return sorted(above, key=lambda expert: -above[expert])[:MAX_K]


class TestForward:
    @pytest.mark.parametrize("score", [SoftmaxBeforeTopK(), Sigmoid()])
    @pytest.mark.parametrize("level", [0.1, 0.4, 0.7, 0.95])
    def test_top_p_uses_what_a_loop_would(self, score, level):
        router = dynamic(score, TopP())
        router.level.fill_(level)
        routing = router(torch.randn(40, 8))
        for ids_K, used_K, scores_E in zip(
            routing.expert_ids_TK, routing.used_TK, routing.scores_TE, strict=True
        ):
            assert ids_K[used_K].tolist() == slow_top_p(router, scores_E.tolist())

    @pytest.mark.parametrize("level", [-0.9, -0.5, -0.2])
    def test_threshold_uses_what_a_loop_would(self, level):
        router = dynamic(Sigmoid(), Threshold(), min_k=0)
        router.level.fill_(level)
        routing = router(torch.randn(40, 8))
        for ids_K, used_K, scores_E in zip(
            routing.expert_ids_TK, routing.used_TK, routing.scores_TE, strict=True
        ):
            assert ids_K[used_K].tolist() == slow_threshold(router, scores_E.tolist())

    def test_threshold_of_a_token_depends_on_no_other(self):
        router, x_TD = dynamic(Sigmoid(), Threshold(), min_k=0), torch.randn(12, 8)
        router.level.fill_(-0.6)
        together = router(x_TD)
        for token in range(12):
            alone = router(x_TD[token : token + 1])
            assert torch.equal(alone.used_TK[0], together.used_TK[token])

    @pytest.mark.parametrize("score", [SoftmaxBeforeTopK(), SoftmaxAfterTopK(), Sigmoid()])
    def test_unused_experts_have_no_weight_and_weights_are_unbiased(self, score):
        router = dynamic(score, TopP(), normalize=True)
        routing = router(torch.randn(40, 8))
        assert 1 < routing.used_TK.sum(-1).double().mean() < MAX_K
        assert torch.equal(routing.weights_TK > 0, routing.used_TK)
        for ids_K, used_K, weights_K, scores_E in zip(
            routing.expert_ids_TK, routing.used_TK, routing.weights_TK, routing.scores_TE, strict=True
        ):
            expected = score.weights(scores_E[ids_K[used_K]])
            torch.testing.assert_close(weights_K[used_K], expected / expected.sum())

    def test_no_expert_at_all_gives_finite_gradients(self):
        router = dynamic(SoftmaxAfterTopK(), Threshold(), min_k=0)
        router.level.fill_(-1e6)
        routing = router(torch.randn(5, 8))
        routing.weights_TK.square().sum().backward()
        assert not routing.used_TK.any()
        assert not routing.weights_TK.any()
        assert not router.weight.grad.any()

    def test_min_k_experts_are_always_used(self):
        router = dynamic(SoftmaxBeforeTopK(), TopP(), min_k=2)
        router.level.fill_(0.0)
        assert torch.equal(router(torch.randn(9, 8)).used_TK.sum(-1), torch.full((9,), 2))


class TestLevel:
    def test_casts_and_checkpoints_keep_it(self):
        router = dynamic(Sigmoid(), TopP())
        router.level.fill_(0.123456789)
        other = dynamic(Sigmoid(), TopP())
        other.load_state_dict(router.state_dict())
        assert torch.equal(copy.deepcopy(other).bfloat16().level, router.level)
        assert other.bfloat16().level.dtype == torch.float32

    def test_reset_starts_it_anew(self):
        router = dynamic(Sigmoid(), TopP())
        router.level.fill_(torch.nan)
        router.reset_parameters()
        assert router.level == TopP.start


class TestErrors:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"min_k": 5}, "'min_k' must be <= max_k (4), got 5."),
            ({"min_k": -1}, "'min_k' must be an integer >= 0, got -1."),
            ({"target_k": 4.5}, "'target_k' must be from min_k (1) to max_k (4), got 4.5."),
            ({"target_k": 0.5}, "'target_k' must be from min_k (1) to max_k (4), got 0.5."),
            ({"target_k": 0.0, "min_k": 0}, "'target_k' must be a number > 0, got 0.0."),
            ({"max_k": 0}, "'max_k' must be an integer >= 1, got 0."),
            ({"max_k": 7}, "'top_k' must be <= num_experts (6), got 7."),
        ],
    )
    def test_numbers_that_do_not_fit_are_named(self, settings, message):
        with pytest.raises(ConfigError) as error:
            dynamic(Sigmoid(), TopP(), **settings)
        assert str(error.value) == message
