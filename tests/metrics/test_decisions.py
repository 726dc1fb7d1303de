from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_plugin.metrics.decisions import flip_rate, router_confidence, score_range


def scores_and_choice(bias: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    scores_TE = torch.randn(40, 6).sigmoid()
    return scores_TE, (scores_TE + bias * torch.arange(6)).topk(2).indices


def all_of(ids_TK: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(ids_TK, dtype=torch.bool)


class TestConfidence:
    @pytest.mark.parametrize("bias", [0.0, 0.1, 5.0])
    def test_equals_numpys_correlation_of_each_token(self, bias):
        scores_TE, ids_TK = scores_and_choice(bias)
        picks_TE = np.zeros((40, 6))
        np.put_along_axis(picks_TE, ids_TK.numpy(), 1, axis=1)
        expected = np.mean(
            [np.corrcoef(s, p)[0, 1] for s, p in zip(scores_TE.numpy(), picks_TE, strict=True)]
        )
        assert router_confidence(scores_TE, ids_TK, all_of(ids_TK)).item() == pytest.approx(
            expected, abs=1e-5
        )

    def test_scores_of_two_values_are_fully_sure(self):
        scores_TE = torch.tensor([[0.1, 0.9, 0.9, 0.1]])
        ids_TK = torch.tensor([[1, 2]])
        assert router_confidence(scores_TE, ids_TK, all_of(ids_TK)).item() == pytest.approx(1.0)

    def test_choices_that_are_not_used_do_not_count(self):
        scores_TE, ids_TK = torch.tensor([[0.1, 0.9, 0.1, 0.1]]), torch.tensor([[1, 0, 2, 3]])
        used_TK = torch.tensor([[True, False, False, False]])
        assert router_confidence(scores_TE, ids_TK, used_TK).item() == pytest.approx(1.0)

    def test_closed_groups_are_left_out(self):
        scores_TE, _ = scores_and_choice()
        padded_TE = torch.cat([scores_TE, torch.full((40, 6), -torch.inf)], dim=1)
        ids_TK = scores_TE.topk(2).indices
        assert router_confidence(padded_TE, ids_TK, all_of(ids_TK)) == router_confidence(
            scores_TE, ids_TK, all_of(ids_TK)
        )
        assert score_range(padded_TE) == score_range(scores_TE)


class TestFlips:
    def test_no_bias_flips_nothing(self):
        scores_TE, ids_TK = scores_and_choice()
        assert flip_rate(scores_TE, ids_TK, all_of(ids_TK)) == 0

    def test_equals_the_choices_that_differ(self):
        scores_TE, ids_TK = scores_and_choice(0.1)
        plain_TK = scores_TE.topk(2).indices
        differing = [len(set(a.tolist()) - set(b.tolist())) for a, b in zip(ids_TK, plain_TK, strict=True)]
        assert flip_rate(scores_TE, ids_TK, all_of(ids_TK)).item() == pytest.approx(sum(differing) / 80)

    def test_varying_numbers_are_compared_with_as_many_of_the_best(self):
        scores_TE, _ = scores_and_choice()
        ids_TK = (scores_TE + 0.1 * torch.arange(6)).topk(4).indices
        used_TK = torch.arange(4) < torch.randint(0, 5, (40, 1))
        flips = 0
        for scores_E, ids_K, used_K in zip(scores_TE, ids_TK, used_TK, strict=True):
            chosen = ids_K[used_K].tolist()
            flips += len(set(chosen) - set(scores_E.argsort(descending=True)[: len(chosen)].tolist()))
        assert flips
        assert flip_rate(scores_TE, ids_TK, used_TK).item() == pytest.approx(flips / used_TK.sum().item())


class TestRange:
    def test_is_the_mean_over_tokens(self):
        assert score_range(torch.tensor([[0.1, 0.4], [0.5, 0.0]])).item() == pytest.approx(0.4)
