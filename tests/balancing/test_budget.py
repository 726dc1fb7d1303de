"""The level that holds the number of experts per token, against plain Python and in training."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_plugin.apps.models.language_model import moe_block
from moe_plugin.attach.balance import balance_
from moe_plugin.balancing.budget import RATE, count_slack_, level_step, new_budget
from moe_plugin.balancing.rules import Proportional, Quantile, Sign
from moe_plugin.experts import ExpertShape
from moe_plugin.routing import (
    DynamicRouter,
    Sigmoid,
    SoftmaxBeforeTopK,
    Threshold,
    TopP,
    ZeroExpertCounts,
    ZeroExpertRouter,
)

ROUTERS = {
    "top_p": partial(DynamicRouter, score=SoftmaxBeforeTopK(), cut=TopP(), max_k=8, normalize=True),
    "threshold": partial(DynamicRouter, score=Sigmoid(), cut=Threshold(), max_k=8, min_k=0),
    "zero_experts": partial(
        ZeroExpertRouter, score=SoftmaxBeforeTopK(), max_k=6, zero_experts=ZeroExpertCounts(identity=8)
    ),
}


def block_of(router: str, target_k: float):
    torch.manual_seed(0)
    block = moe_block(16, partial(ROUTERS[router], target_k=target_k), ExpertShape(16, 2, 8))
    block.router.weight.data.mul_(3)
    return block


def train(block, balanced, steps, tokens=512, shift=0.0):
    """Experts per token of each step."""
    used = []
    for _ in range(steps):
        block(torch.randn(tokens, 16) + shift).square().mean().backward()
        record = balanced.update()
        (counts_E,), (seen,) = record.counts.values(), record.tokens.values()
        assert seen == tokens
        used.append((counts_E.sum() / seen).item())
    return torch.tensor(used)


class TestLevelStep:
    @settings(max_examples=200, deadline=None)
    @given(
        seed=st.integers(0, 10**6),
        tokens=st.integers(20, 200),
        target=st.floats(0.5, 3.5),
        scale=st.floats(0.01, 2),
    )
    def test_full_step_meets_the_target(self, seed, tokens, target, scale):
        slack_TK = torch.randn(tokens, 4, generator=torch.Generator().manual_seed(seed)).mul(scale)
        budget = new_budget()
        count_slack_(budget, slack_TK)
        full = level_step(budget, torch.tensor(tokens), target) / RATE
        # Read from bins half an octave wide, the step is right within a factor of the square root of two.
        near = sorted((slack_TK + full * factor > 0).sum().item() / tokens for factor in (0.7, 1.43))
        assert near[0] - 1 / tokens <= target <= near[1] + 1 / tokens

    def test_met_target_moves_nothing(self):
        budget = new_budget()
        count_slack_(budget, torch.tensor([[0.5, -0.5], [0.1, -0.3]]))
        assert level_step(budget, torch.tensor(2), 1.0) == 0

    def test_experts_used_at_any_level_count_as_used(self):
        budget = new_budget()
        count_slack_(budget, torch.tensor([[torch.inf, 0.25], [torch.inf, -0.25]]))
        assert level_step(budget, torch.tensor(2), 1.0) < 0
        assert level_step(budget, torch.tensor(2), 2.0) > 0

    def test_padding_does_not_count(self):
        budget = new_budget()
        count_slack_(budget, torch.ones(3, 2), torch.tensor([True, False, True]))
        assert budget.sum() == 4


class TestHeldBudget:
    @pytest.mark.parametrize("target", [1.0, 1.5, 2.0, 4.0])
    @pytest.mark.parametrize("router", ["top_p", "threshold", "zero_experts"])
    def test_mean_of_the_last_third_is_within_two_percent(self, router, target):
        block = block_of(router, target)
        used = train(block, balance_(block, Proportional(rate="auto")), 150)
        assert used[100:].mean().item() == pytest.approx(target, rel=0.02)

    @pytest.mark.parametrize("router", ["top_p", "threshold", "zero_experts"])
    def test_budget_is_held_when_the_data_change(self, router):
        block = block_of(router, 2.0)
        balanced = balance_(block, Quantile())
        train(block, balanced, 100)
        shifted = train(block, balanced, 150, shift=torch.linspace(-0.5, 0.5, 16))
        assert shifted[50:].mean().item() == pytest.approx(2.0, rel=0.03)

    @pytest.mark.parametrize("router", ["top_p", "threshold", "zero_experts"])
    def test_routed_experts_are_balanced_among_themselves(self, router):
        block = block_of(router, 2.0)
        balanced = balance_(block, Proportional(rate="auto"))
        train(block, balanced, 120, tokens=4096)
        (counts_E,) = balanced.record.counts.values()
        assert counts_E.shape == (16,)
        assert counts_E.max() / counts_E.double().mean() < 1.2

    def test_watching_alone_holds_the_budget_and_moves_no_bias(self):
        block = block_of("top_p", 2.0)
        balanced = balance_(block, rule=None)
        used = train(block, balanced, 90)
        assert used[60:].mean().item() == pytest.approx(2.0, rel=0.03)
        assert not block.router.expert_bias.any()

    def test_rejected_step_leaves_the_level_alone(self):
        block = block_of("threshold", 2.0)
        balanced = balance_(block, Sign())
        train(block, balanced, 1)
        before = block.router.level.clone()
        block(torch.randn(64, 16)).sum().backward()
        balanced.reject_if_(torch.tensor(True))
        balanced.update()
        assert torch.equal(block.router.level, before)


class TestCounts:
    @pytest.mark.parametrize("router", ["top_p", "threshold", "zero_experts"])
    def test_counts_are_the_used_picks(self, router):
        block = block_of(router, 2.0)
        site = next(iter(balance_(block).values()))
        routings = []
        block.router.register_forward_hook(lambda _module, _args, routing: routings.append(routing))
        block(torch.randn(50, 16))
        (routing,) = routings
        ids = routing.expert_ids_TK[routing.used_TK]
        assert site.counts.tolist() == torch.bincount(ids, minlength=16).tolist()
        block.eval()(torch.randn(30, 16))
        assert site.eval_tokens == 30
        assert site.eval_counts.sum() == routings[1].used_TK.sum()


def level_on_rank(rank, results, router):
    block = block_of(router, 1.5)
    balanced = balance_(block, Proportional(rate=0.05))
    for step in range(6):
        torch.manual_seed(step)
        x_TD = torch.randn(60, 16)
        parts = {None: x_TD, 0: x_TD[:20], 1: x_TD[20:]}
        block(parts[rank]).sum().backward()
        balanced.update()
    level = getattr(block.router, "level", torch.zeros(()))
    results[rank] = (level.item(), block.router.expert_bias.tolist())


class TestRanks:
    @pytest.mark.parametrize("router", ["top_p", "threshold", "zero_experts"])
    def test_two_ranks_equal_one_process(self, router, on_ranks):
        alone: dict = {}
        level_on_rank(None, alone, router)
        ranks = on_ranks(2, level_on_rank, router)
        assert ranks[0] == ranks[1] == alone[None]
