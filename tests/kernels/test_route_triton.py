from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_plugin.errors import ConfigError
from moe_plugin.kernels import route
from moe_plugin.routing import LogSigmoid, Sigmoid, SoftmaxAfterTopK, SoftmaxBeforeTopK
from moe_plugin.routing.scores import Score
from tests.kernels.cases import DEVICES, SEEDS

pytest.importorskip("triton", reason="needs Triton: pip install 'moe_plugin[triton]'")
from moe_plugin.kernels import route_triton

SCORES = [Sigmoid(), SoftmaxBeforeTopK(), SoftmaxAfterTopK()]


def is_clear(logits_TE: torch.Tensor, bias_E: torch.Tensor, score: Score) -> bool:
    """Whether experts differ by more than rounding, unless they are equal in logit and bias."""
    ranked_TE = (score.scores(logits_TE.double()) + bias_E.double()).sort().values
    gaps_TE = ranked_TE.diff()
    return bool(((gaps_TE < 1e-12) | (gaps_TE > 1e-6)).all())


@pytest.mark.parametrize("device", DEVICES)
class TestTwins:
    @settings(max_examples=40, deadline=None)
    @given(data=st.data(), score=st.sampled_from(SCORES), num_tokens=st.integers(0, 40), seed=SEEDS)
    def test_any_logits_give_the_same(
        self, device: str, data: st.DataObject, score: Score, num_tokens: int, seed: int
    ) -> None:
        num_experts = data.draw(st.integers(1, 70))
        top_k = data.draw(st.integers(1, min(16, num_experts)))
        torch.manual_seed(seed)
        logits_TE = torch.randn(num_tokens, num_experts)
        if data.draw(st.booleans(), label="ties"):
            logits_TE = logits_TE.round()
        bias_E = 0.1 * torch.randn(num_experts).round()
        assume(is_clear(logits_TE, bias_E, score))
        valid_T = data.draw(st.sampled_from([None, torch.rand(num_tokens) < 0.7]))
        given = (
            logits_TE.to(device),
            bias_E.to(device),
            score,
            top_k,
            valid_T if valid_T is None else valid_T.to(device),
        )
        torch.testing.assert_close(route_triton.route(*given), route.route(*given))

    @pytest.mark.parametrize("score", SCORES, ids=lambda score: type(score).__name__)
    def test_many_experts_give_the_same(self, device: str, score: Score) -> None:
        torch.manual_seed(0)
        logits_TE = torch.arange(9 * 512.0).view(9, 512)[:, torch.randperm(512)] % 512 / 32
        given = logits_TE.to(device), torch.zeros(512, device=device), score, 16
        torch.testing.assert_close(route_triton.route(*given), route.route(*given))

    def test_equal_experts_are_taken_by_lowest_id(self, device: str) -> None:
        logits_TE = torch.tensor([[1.0, 0.0, 1.0, -0.0, 1.0, 0.0]], device=device)
        ids_TK = route_triton.route(
            logits_TE, torch.zeros(6, device=device), SoftmaxAfterTopK(), 6
        ).expert_ids_TK
        assert ids_TK.tolist() == [[0, 2, 4, 1, 3, 5]]

    def test_nan_and_infinities_are_ordered_as_by_the_twin(self, device: str) -> None:
        logits_TE = torch.tensor([[0.0, math.nan, -math.inf, math.inf, math.nan, -1.0]], device=device)
        given = logits_TE, torch.zeros(6, device=device), SoftmaxAfterTopK(), 6
        one, other = route_triton.route(*given), route.route(*given)
        assert one.expert_ids_TK.tolist() == other.expert_ids_TK.tolist() == [[1, 4, 3, 0, 5, 2]]
        torch.testing.assert_close(one, other, equal_nan=True)

    def test_views_are_read_as_they_are(self, device: str) -> None:
        logits_TE = torch.tensor(
            [[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0], [9.0, -9.0, -9.0, 9.0]], device=device
        ).T
        bias_E = torch.tensor([0.1, 0.0, 0.2, 0.0, 0.3, 0.0], device=device)[::2]
        valid_T = torch.tensor([True, True, False, False, False, True, True, True], device=device)[::2]
        given = logits_TE, bias_E, Sigmoid(), 1, valid_T
        torch.testing.assert_close(route_triton.route(*given), route.route(*given))


class TestRefusals:
    def test_another_score_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"'score' must be one of Sigmoid, .* got LogSigmoid\(\)"):
            route_triton.route(torch.randn(3, 4), torch.zeros(4), LogSigmoid(), 2)

    def test_too_many_experts_per_token_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="'top_k' must be between"):
            route_triton.route(torch.randn(3, 4), torch.zeros(4), Sigmoid(), 5)
