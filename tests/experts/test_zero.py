from __future__ import annotations

import torch

from moe_plugin.experts import ZeroExperts
from moe_plugin.routing import ZeroExpertCounts
from moe_plugin.types import Routing


class TestZeroExperts:
    def test_equals_a_loop_over_picks(self):
        torch.manual_seed(0)
        experts = ZeroExperts(3, 8, ZeroExpertCounts(identity=2, zero=1, constant=2)).double()
        experts.vectors.data.normal_()
        ids_TK, weights_TK = torch.randint(0, 8, (20, 3)), torch.rand(20, 3, dtype=torch.float64)
        x_TD = torch.randn(20, 8, dtype=torch.float64)
        expected_TD = torch.zeros_like(x_TD)
        for token in range(20):
            for expert, weight in zip(ids_TK[token].tolist(), weights_TK[token], strict=True):
                x = x_TD[token]
                if expert in (3, 4):
                    expected_TD[token] += weight * x
                elif expert in (5, 6):
                    a, b = (experts.mixing[expert - 5] @ x).softmax(0)
                    expected_TD[token] += weight * (a * x + b * experts.vectors[expert - 5])
        y_TD = experts(x_TD, Routing(weights_TK, ids_TK, weights_TK))
        torch.testing.assert_close(y_TD, expected_TD)

    def test_without_constant_experts_nothing_is_learnt(self):
        experts = ZeroExperts(3, 8, ZeroExpertCounts(identity=2))
        assert sum(parameter.numel() for parameter in experts.parameters()) == 0
