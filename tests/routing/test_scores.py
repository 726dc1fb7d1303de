from __future__ import annotations

import math
import pickle

import pytest
import torch

from moe_plugin.routing import Sigmoid, SoftmaxAfterTopK, SoftmaxBeforeTopK, SqrtSoftplus

ALL = [Sigmoid(), SqrtSoftplus(), SoftmaxBeforeTopK(), SoftmaxAfterTopK()]


@pytest.mark.parametrize("score", ALL, ids=repr)
class TestEveryScore:
    def test_scores_keep_the_order_of_the_logits(self, score):
        logits_TE = torch.randn(64, 16)
        assert torch.equal(score.scores(logits_TE).argsort(-1), logits_TE.argsort(-1))

    def test_probabilities_sum_to_one(self, score):
        probabilities_TE = score.probabilities(score.scores(torch.randn(64, 16)))
        assert (probabilities_TE >= 0).all()
        torch.testing.assert_close(probabilities_TE.sum(-1), torch.ones(64))

    def test_pickled_compares_equal(self, score):
        assert pickle.loads(pickle.dumps(score)) == score

    @pytest.mark.parametrize("logit", [-1e4, -100.0, 0.0, 100.0])
    def test_extreme_logits_have_finite_scores_and_gradients(self, score, logit):
        logits_TE = torch.full((2, 4), logit, requires_grad=True)
        probabilities_TE = score.probabilities(score.scores(logits_TE))
        probabilities_TE[:, 0].sum().backward()
        assert probabilities_TE.isfinite().all()
        assert logits_TE.grad.isfinite().all()


class TestValues:
    def test_sigmoid_matches_its_formula(self):
        assert Sigmoid().scores(torch.tensor([[0.7]])).item() == pytest.approx(1 / (1 + math.exp(-0.7)))

    def test_sqrt_softplus_matches_its_formula(self):
        expected = math.sqrt(math.log1p(math.exp(0.7)))
        assert SqrtSoftplus().scores(torch.tensor([[0.7]])).item() == pytest.approx(expected)

    def test_softmax_before_top_k_sums_to_one_over_all(self):
        scores_TE = SoftmaxBeforeTopK().scores(torch.randn(8, 16))
        torch.testing.assert_close(scores_TE.sum(-1), torch.ones(8))

    def test_softmax_after_top_k_weights_sum_to_one_over_selected(self):
        score, logits_TE = SoftmaxAfterTopK(), torch.randn(8, 16)
        assert torch.equal(score.scores(logits_TE), logits_TE)
        torch.testing.assert_close(score.weights(logits_TE[:, :3]), logits_TE[:, :3].softmax(-1))
