from __future__ import annotations

import pytest
import torch

from moe_plugin.errors import ConfigError
from moe_plugin.losses import LoadBalancingLoss
from moe_plugin.routing import Router, Sigmoid, SoftmaxBeforeTopK
from moe_plugin.types import Routing


def reference(routing: Routing, num_experts: int) -> float:
    """Equations 4 to 6 of arXiv 2101.03961 in plain Python, for K selections per token."""
    scores, ids = routing.scores_TE.tolist(), routing.expert_ids_TK.tolist()
    total = 0.0
    for expert in range(num_experts):
        load = sum(row.count(expert) for row in ids) / (len(ids) * len(ids[0]))
        probability = sum(row[expert] / sum(row) for row in scores) / len(scores)
        total += load * probability
    return num_experts * total


@pytest.mark.parametrize("score", [Sigmoid(), SoftmaxBeforeTopK()], ids=repr)
class TestValue:
    def test_random_routing_matches_reference(self, score):
        routing = Router(8, 16, 3, score=score)(torch.randn(40, 8))
        assert LoadBalancingLoss(0.5)(routing, 16).item() == pytest.approx(
            0.5 * reference(routing, 16), rel=1e-5
        )

    def test_micro_batches_give_the_gradient_of_one(self, score):
        router, x_TD, loss = Router(8, 16, 3, score=score), torch.randn(40, 8), LoadBalancingLoss(0.5)
        loss(router(x_TD), 16).backward()
        expected, router.weight.grad = router.weight.grad, None
        for _ in range(4):  # As Lightning accumulates: the same tokens four times, each loss divided by four.
            (loss(router(x_TD), 16) / 4).backward()
        torch.testing.assert_close(router.weight.grad, expected)


class TestLimits:
    def test_uniform_routing_costs_the_coefficient(self):
        ids_TK = torch.arange(8).view(4, 2)
        routing = Routing(torch.ones(4, 2), ids_TK, torch.full((4, 8), 1 / 8))
        assert LoadBalancingLoss(0.01)(routing, 8).item() == pytest.approx(0.01)

    def test_one_expert_costs_coefficient_times_experts(self):
        scores_TE = torch.eye(8)[torch.zeros(4, dtype=torch.long)]
        routing = Routing(torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.long), scores_TE)
        assert LoadBalancingLoss(0.01)(routing, 8).item() == pytest.approx(0.08)

    def test_gradient_lowers_the_loaded_expert(self):
        logits_TE = torch.zeros(4, 8, requires_grad=True)
        routing = Routing(torch.ones(4, 1), torch.full((4, 1), 3), logits_TE.softmax(-1))
        LoadBalancingLoss(1.0)(routing, 8).backward()
        assert (logits_TE.grad[:, 3] > 0).all()
        assert (logits_TE.grad[:, :3] < 0).all()

    def test_no_token_costs_nothing(self):
        routing = Router(8, 16, 3, score=Sigmoid())(torch.randn(0, 8))
        assert LoadBalancingLoss(0.5)(routing, 16).item() == 0

    @pytest.mark.parametrize("coefficient", [-0.01, float("nan"), float("inf")])
    def test_bad_coefficient_is_refused(self, coefficient):
        with pytest.raises(ConfigError, match="'coefficient' must be a finite number >= 0, got"):
            LoadBalancingLoss(coefficient)
