from __future__ import annotations

import torch

from moe_plugin.metrics.rank_groups import rank_violation


class TestRankViolation:
    def test_neighbouring_experts_share_a_rank_and_layers_that_do_not_divide_are_nan(self):
        tokens_NLE = torch.tensor([[[9, 1, 0, 0, 2, 2, 1, 1], [5, 5, 1, 0, 0, 0, 0, 0]]])
        violation_NL = rank_violation(tokens_NLE, [8, 3], 2)
        assert violation_NL[0, 0] == (10 - 8) / 8
        assert violation_NL[0, 1].isnan()
