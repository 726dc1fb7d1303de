"""The checks of gate weights separate those from unbiased scores from others.

Shape legend: T tokens, D model width, E experts, K experts selected per token.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.families.gates import SCORES, explained
from tests.families.odd_gates import explained as explained_odd

T, D, E, K = 12, 6, 8, 2
BIAS_E = torch.eye(E)[1] * 100


def output(name: str, *, biased: bool, normalised: bool = True) -> tuple:
    logits_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(0))
    scores_TE = SCORES[name](logits_TE)
    ids_TK = (scores_TE + BIAS_E).topk(K).indices
    weights_TK = (scores_TE + BIAS_E * biased).gather(1, ids_TK)
    return logits_TE, weights_TK / (weights_TK.sum(-1, keepdim=True) if normalised else 1), ids_TK


class TestExplained:
    @pytest.mark.parametrize("normalised", [False, True])
    @pytest.mark.parametrize("name", SCORES)
    def test_weights_of_unbiased_scores_are_named_and_of_biased_ones_are_an_error(self, name, normalised):
        assert explained(output(name, biased=False, normalised=normalised), E, K) == name
        with pytest.raises(AssertionError, match="follow from no formula"):
            explained(output(name, biased=True, normalised=normalised), E, K)

    def test_output_without_weights_explains_nothing(self):
        logits_TE, _, ids_TK = output("softmax", biased=False)
        assert explained((logits_TE, ids_TK), E, K) is None


class PhimoeTopKRouter(SimpleNamespace):
    """The numbers that the check of Phi-3.5-MoE's sampled picks reads."""


class TestSampledPicks:
    def sampled(self, factor: float) -> tuple:
        """Picks of an expert that is not the likeliest, at ``factor`` times their unbiased weight."""
        random = torch.Generator().manual_seed(0)
        x_TD, weight = torch.randn(T, D, generator=random), torch.randn(E, D, generator=random)
        scores_TE = x_TD @ weight.T
        ids_TK = scores_TE.argsort(-1, descending=True)[:, [1, 0]]
        first_TE = scores_TE.softmax(-1)
        second_TE = scores_TE.scatter(1, ids_TK[:, :1], -torch.inf).softmax(-1)
        weights_TK = torch.cat([first_TE.gather(1, ids_TK[:, :1]), second_TE.gather(1, ids_TK[:, 1:])], dim=1)
        router = PhimoeTopKRouter(weight=weight, training=True, router_jitter_noise=1e3)
        return router, x_TD, (scores_TE, weights_TK * torch.tensor([factor, 1.0]), ids_TK), torch.zeros(E)

    @pytest.mark.parametrize("factor", [1.0, 0.3333])
    def test_unlikely_pick_weighs_all_or_a_third(self, factor):
        assert explained_odd(*self.sampled(factor)) == "softmax of those near the best"

    @pytest.mark.parametrize("factor", [1.1, 0.4])
    def test_other_weights_are_an_error(self, factor):
        with pytest.raises(AssertionError):
            explained_odd(*self.sampled(factor))
