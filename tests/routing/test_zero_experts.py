from __future__ import annotations

import pytest
import torch

from moe_plugin.errors import ConfigError
from moe_plugin.routing import SoftmaxBeforeTopK, ZeroExpertCounts, ZeroExpertRouter


def zero_router(**settings):
    torch.manual_seed(0)
    counts = ZeroExpertCounts(identity=2, constant=1)
    return ZeroExpertRouter(
        8, 5, 2, score=SoftmaxBeforeTopK(), **{"max_k": 3, "zero_experts": counts} | settings
    )


class TestZeroExpertRouter:
    def test_only_picks_of_routed_experts_are_used(self):
        router = zero_router()
        routing = router(torch.randn(30, 8))
        assert router.num_experts == 8
        assert routing.scores_TE.shape == (30, 8)
        assert torch.equal(routing.used_TK, routing.expert_ids_TK < 5)
        assert 0 < routing.used_TK.sum() < 90

    def test_shares_hold_the_target(self):
        shares = zero_router(target_k=1.5).allocation().load_shares_E
        assert sum(shares) == pytest.approx(1)
        assert 3 * sum(shares[:5]) == pytest.approx(1.5)
        assert len(set(shares[:5])) == len(set(shares[5:])) == 1

    @pytest.mark.parametrize(
        ("target", "allowed"), [(3, r"be < max_k \(3\), got 3\."), (0, r"be a number > 0, got 0\.")]
    )
    def test_target_of_all_or_no_picks_is_refused(self, target, allowed):
        with pytest.raises(ConfigError, match=f"'target_k' must {allowed}"):
            zero_router(target_k=target)


class TestZeroExpertCounts:
    def test_none_is_refused(self):
        message = r"'zero_experts' must have an expert of some kind, got ZeroExpertCounts\(identity=0,"
        with pytest.raises(ConfigError, match=message):
            ZeroExpertCounts()

    @pytest.mark.parametrize("value", [-1, 0.5, True])
    def test_number_that_is_no_count_is_refused(self, value):
        with pytest.raises(ConfigError, match=rf"'zero' must be an integer >= 0, got {value}\."):
            ZeroExpertCounts(identity=2, zero=value)
