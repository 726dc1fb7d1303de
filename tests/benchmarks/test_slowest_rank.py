from __future__ import annotations

import pytest
import torch

from benchmarks.cases.slowest_rank import one_full_rank, slowest_and_mean
from benchmarks.turns import Turns
from benchmarks.two_ranks import OWN, skewed


class TestLoads:
    @pytest.mark.parametrize("ranks", [2, 4, 8, 16])
    @pytest.mark.parametrize("violation", [0.0, 0.5, 1.0])
    def test_first_rank_has_the_violation_and_the_others_are_equal(
        self, ranks: int, violation: float
    ) -> None:
        loads_R = one_full_rank(violation, ranks, 16384).view(ranks, -1).sum(-1).tolist()
        assert loads_R[0] == pytest.approx((1 + violation) * 16384 / ranks, abs=16)
        assert loads_R[1:] == [loads_R[1]] * (ranks - 1)
        assert sum(loads_R) == pytest.approx(16384, abs=16 * ranks)

    @pytest.mark.parametrize("violation", [0.0, 0.25, 1.0])
    def test_ids_go_to_the_first_rank_in_proportion(self, violation: float) -> None:
        ids_TK = skewed(violation, tokens=4000)
        assert (ids_TK < OWN).sum() == 4000 * (1 + violation)
        assert ids_TK.min() >= 0
        assert ids_TK.max() < 2 * OWN


class TestSlowest:
    def test_fullest_rank_of_each_layer_and_round_is_added_up(self) -> None:
        # Two rounds, two layers, two ranks of two experts each.
        counts_NLE = torch.tensor([[[9, 0, 1, 0], [0, 1, 0, 9]], [[0, 1, 5, 5], [1, 1, 0, 9]]])
        seconds = {"0 0": [1.0, 2.0], "0 1": [3.0, 4.0], "1 0": [50.0, 60.0], "1 1": [70.0, 80.0]}
        turns = slowest_and_mean(Turns(seconds), counts_NLE, ranks=2)
        assert turns.seconds == {"slowest": [1.0 + 70.0, 4.0 + 80.0], "mean rank": [2.0 + 60.0, 3.0 + 70.0]}
