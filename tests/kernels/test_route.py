from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_plugin.errors import ConfigError
from moe_plugin.kernels.route import route
from moe_plugin.routing import LogSigmoid, Sigmoid, SoftmaxAfterTopK, SoftmaxBeforeTopK, SqrtSoftplus
from moe_plugin.routing.scores import Score

SCORES = [Sigmoid(), LogSigmoid(), SqrtSoftplus(), SoftmaxBeforeTopK(), SoftmaxAfterTopK()]
TIED = st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0])


class TestRoute:
    @settings(max_examples=60, deadline=None)
    @given(data=st.data(), score=st.sampled_from(SCORES), num_tokens=st.integers(0, 5))
    def test_any_logits_match_a_stable_python_sort(
        self, data: st.DataObject, score: Score, num_tokens: int
    ) -> None:
        num_experts = data.draw(st.integers(1, 7))
        top_k = data.draw(st.integers(1, num_experts))
        size = num_tokens * num_experts
        logits_TE = torch.tensor(data.draw(st.lists(TIED, min_size=size, max_size=size))).view(
            -1, num_experts
        )
        bias_E = torch.tensor(data.draw(st.lists(TIED, min_size=num_experts, max_size=num_experts)))
        valid = data.draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens))
        ids_TK, scores_TK, counts_E = route(
            logits_TE, bias_E, score, top_k, torch.tensor(valid, dtype=torch.bool)
        )
        scores_TE, counts = score.scores(logits_TE), [0] * num_experts
        for token, is_valid in enumerate(valid):
            ranked = (scores_TE[token] + bias_E).tolist()
            best = sorted(range(num_experts), key=lambda expert: -ranked[expert])[:top_k]
            assert ids_TK[token].tolist() == best
            assert torch.equal(scores_TK[token], scores_TE[token][best])
            for expert in best:
                counts[expert] += is_valid
        assert counts_E.tolist() == counts
        assert counts_E.dtype == torch.int64

    def test_without_a_mask_every_token_counts(self) -> None:
        counts_E = route(torch.randn(50, 6), torch.zeros(6), Sigmoid(), 2).counts_E
        assert counts_E.sum() == 100

    def test_nan_comes_first(self) -> None:
        logits_TE = torch.tensor([[math.inf, math.nan, 0.0]])
        assert route(logits_TE, torch.zeros(3), Sigmoid(), 2).expert_ids_TK.tolist() == [[1, 0]]

    def test_gives_no_gradient(self) -> None:
        logits_TE = torch.randn(3, 4, requires_grad=True)
        assert not route(logits_TE, torch.zeros(4), Sigmoid(), 2).scores_TK.requires_grad

    @pytest.mark.parametrize("top_k", [0, 5])
    def test_other_than_that_many_experts_is_refused(self, top_k: int) -> None:
        with pytest.raises(
            ConfigError, match=rf"'top_k' must be between 1 and num_experts \(4\), got {top_k}"
        ):
            route(torch.randn(3, 4), torch.zeros(4), Sigmoid(), top_k)
