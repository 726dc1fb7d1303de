"""What always holds (section 6 of docs/architecture.md), each on 200 drawn cases of a small model.

The router ranks logits that its input holds as they are, so no rounding depends on how tokens are batched.

Shape legend: B batch, S sequence, T tokens (B x S), E experts, K experts per token.
"""

from __future__ import annotations

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_plugin.attach import balanced_model
from moe_plugin.attach.balance import balance_
from moe_plugin.attach.balanced_model import BalancedModel, find_balanced
from moe_plugin.balancing.rules import PID, Load, Momentum, Sign
from tests.hosts import Block

often = settings(max_examples=200, deadline=None)
seeds = st.integers(0, 2**31)
sizes = st.sampled_from([(2, 1), (4, 1), (4, 2), (8, 3)])
"""E and K."""
RULES = (Sign(rate=0.125), Momentum(rate=0.125), PID(rate=0.125))
SIGN = RULES[0]
NO_TOKEN_BS = torch.zeros(4, 4, dtype=torch.bool)


class LogitRouter(nn.Module):
    """Ranks logits and weighs by the softmax of those selected, as Mixtral does; an expert's is its input's entry."""

    def __init__(self, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.weight = nn.Parameter(torch.eye(num_experts))

    def forward(self, x_TE):
        logits_TK, ids_TK = torch.topk(x_TE @ self.weight.T, self.top_k, dim=-1)
        return logits_TK.softmax(-1), ids_TK


class Layer(nn.Module):
    """One block of experts, recomputed in the backward if asked for."""

    def __init__(self, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.block = Block(LogitRouter(num_experts, top_k), num_experts)
        self.recomputes: bool | None = None

    def forward(self, x_BSE, attention_mask=None):
        if self.recomputes is None:
            return self.block(x_BSE)
        return checkpoint(self.block, x_BSE, use_reentrant=self.recomputes)


@cache
def made(size: tuple[int, int], rule: object, number: int) -> tuple[Layer, BalancedModel]:
    """Returns a balanced layer; to attach takes longer than a case does."""
    layer = Layer(*size)
    return layer, balance_(layer, rule)


def fresh(size: tuple[int, int], seed: int = 0, rule: object = SIGN, number: int = 0):
    """Returns a balanced layer with drawn experts that has seen nothing, and its bias; some, by number, at once."""
    layer, balanced = made(size, rule, number)
    draw_(layer, seed)
    layer.recomputes = None
    state = {name: {"bias": torch.zeros(size[0]), "state": {}} for name in balanced}
    balanced.load_state_dict({"step": 0, "sites": state})
    return layer, balanced, balanced["block.router"].bias


def draw_(layer: Layer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer.zero_grad()
    with torch.no_grad():
        for expert in layer.block.experts:
            expert.weight.normal_(generator=generator)
        layer.block.router.weight.copy_(torch.eye(layer.block.router.num_experts))


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(size: tuple[int, int], seed: int) -> torch.Tensor:
    """Returns x_BSE of four rows of four tokens."""
    return drawn(seed + 1, 4, 4, size[0])


def trained(layer: Layer, x_BSE: torch.Tensor, mask_BS: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the output of a forward, after its backward."""
    out_BSE = layer(x_BSE, attention_mask=mask_BS)
    out_BSE.square().sum().backward()
    return out_BSE


def counts_of(balanced: BalancedModel) -> list[int]:
    return balanced["block.router"].counts.tolist()


def gradients(layer: Layer) -> list[torch.Tensor]:
    return [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]


class TestCounts:
    @often
    @given(sizes, seeds, st.lists(st.booleans(), min_size=16, max_size=16), st.booleans(), st.booleans())
    def test_sum_is_valid_tokens_times_k_of_training_only(
        self, size, seed, valid, validates, watches
    ) -> None:
        layer, balanced, _ = fresh(size, seed)
        x_BSE = inputs(size, seed)
        if validates:
            layer.eval()(x_BSE)
            layer.train()
        if watches:
            with torch.no_grad():
                layer(x_BSE)
        trained(layer, x_BSE, torch.tensor(valid).view(4, 4))
        expected = [0] * size[0]
        for row, is_real in zip(x_BSE.view(16, -1).tolist(), valid, strict=True):
            for expert in sorted(range(size[0]), key=row.__getitem__)[-size[1] :]:
                expected[expert] += is_real
        assert counts_of(balanced) == expected
        assert sum(expected) == sum(valid) * size[1]

    @often
    @given(sizes, seeds, st.booleans())
    def test_recomputation_counts_nothing_and_changes_nothing(self, size, seed, is_reentrant) -> None:
        found = []
        for recomputes in (None, is_reentrant):
            layer, balanced, bias_E = fresh(size, seed)
            layer.recomputes = recomputes
            out_BSE = trained(layer, inputs(size, seed).requires_grad_())
            counts = counts_of(balanced)
            assert sum(counts) == 16 * size[1]
            balanced.update()
            found.append((counts, bias_E.tolist(), out_BSE.tolist()))
        assert found[0] == found[1]


class TestHost:
    @often
    @given(sizes, seeds)
    def test_zero_bias_gives_outputs_and_gradients_bit_for_bit(self, size, seed) -> None:
        layer = fresh(size, seed)[0]
        untouched = Layer(*size)
        untouched.load_state_dict(layer.state_dict())
        x_BSE = inputs(size, seed)
        assert torch.equal(trained(layer, x_BSE), trained(untouched, x_BSE))
        assert all(map(torch.equal, gradients(layer), gradients(untouched)))

    @often
    @given(sizes, seeds)
    def test_remove_restores_outputs_whatever_the_bias_was(self, size, seed) -> None:
        layer = copy.deepcopy(fresh(size, seed)[0])
        untouched = Layer(*size)
        untouched.load_state_dict(layer.state_dict())
        balanced, x_BSE = find_balanced(layer), inputs(size, seed)
        balanced["block.router"].bias.copy_(drawn(seed, size[0]))
        layer(x_BSE)
        balanced.remove()
        assert torch.equal(layer(x_BSE), untouched(x_BSE))
        assert type(layer.block.router) is LogitRouter
        assert find_balanced(layer) is None


class TestBias:
    @often
    @given(sizes, seeds)
    def test_gates_are_those_of_unbiased_scores_of_what_it_selects(self, size, seed) -> None:
        layer, _, bias_E = fresh(size, seed)
        bias_E.copy_(drawn(seed, size[0]))
        x_TE = inputs(size, seed).view(16, -1)
        weights_TK, ids_TK = layer.block.router(x_TE)
        for token, (row, chosen) in enumerate(zip(x_TE.tolist(), ids_TK.tolist(), strict=True)):
            biased = [score + bias for score, bias in zip(row, bias_E.tolist(), strict=True)]
            assert set(chosen) == set(sorted(range(size[0]), key=biased.__getitem__)[-size[1] :])
            powers = [math.exp(row[expert]) for expert in chosen]
            expected_K = torch.tensor([power / sum(powers) for power in powers])
            torch.testing.assert_close(weights_TK[token], expected_K, rtol=1e-5, atol=1e-6)

    @often
    @given(sizes, seeds)
    def test_no_gradient_reaches_it(self, size, seed) -> None:
        layer, balanced, bias_E = fresh(size, seed)
        bias_E.copy_(drawn(seed, size[0]))
        assert layer(inputs(size, seed)).requires_grad
        trained(layer, inputs(size, seed))
        assert bias_E.grad is None
        assert not balanced["block.router"].bias_place.tensor().requires_grad

    @often
    @given(sizes, seeds, st.integers(-64, 64))
    def test_one_constant_changes_no_selection(self, size, seed, eighths) -> None:
        layer, _, bias_E = fresh(size, seed)
        # Multiples of 1/64, so that adding the constant is exact.
        x_TE = (inputs(size, seed).view(16, -1) * 64).round() / 64
        bias_E.copy_((drawn(seed, size[0]) * 64).round() / 64)
        before_TK = layer.block.router(x_TE)[1]
        bias_E.add_(eighths / 8)
        assert torch.equal(layer.block.router(x_TE)[1], before_TK)

    @often
    @given(sizes, seeds, st.randoms(use_true_random=False))
    def test_permuted_experts_permute_everything(self, size, seed, random) -> None:
        order = random.sample(range(size[0]), size[0])
        x_BSE, found = inputs(size, seed), []
        for experts in (list(range(size[0])), order):
            layer, balanced, bias_E = fresh(size, seed)
            with torch.no_grad():
                layer.block.router.weight.copy_(torch.eye(size[0])[experts])
                stacked = [expert.weight.clone() for expert in layer.block.experts]
                for expert, source in zip(layer.block.experts, experts, strict=True):
                    expert.weight.copy_(stacked[source])
                    expert.bias.zero_()
            bias_E.copy_(drawn(seed, size[0])[experts])
            out_BSE = layer(x_BSE)
            counts = counts_of(balanced)
            balanced.update()
            found.append((out_BSE, counts, bias_E.clone()))
        (out_BSE, counts, bias_E), (permuted_BSE, permuted_counts, permuted_bias_E) = found
        torch.testing.assert_close(permuted_BSE, out_BSE)
        assert permuted_counts == [counts[expert] for expert in order]
        assert torch.equal(permuted_bias_E, bias_E[order])


class Ranks:
    """A process group of threads: each gives its counts and gets the sums."""

    def __init__(self, world_size: int) -> None:
        self.collectives = 0
        self._given: list[list[torch.Tensor]] = []
        self._barrier = threading.Barrier(world_size)

    def all_reduce_(self, counts, group=None) -> None:
        self._given.append([count.clone() for count in counts])
        self._barrier.wait(timeout=10)
        sums = [torch.stack(parts).sum(0) for parts in zip(*self._given, strict=True)]
        if self._barrier.wait(timeout=10) == 0:
            self.collectives += 1
            self._given.clear()
        self._barrier.wait(timeout=10)
        for count, summed in zip(counts, sums, strict=True):
            count.copy_(summed)


class TestTrajectory:
    @often
    @given(sizes, seeds, st.sampled_from(RULES), st.sampled_from([1, 2, 4]))
    def test_accumulation_changes_nothing(self, size, seed, rule, parts) -> None:
        found = []
        for accumulated in (1, parts):
            layer, balanced, bias_E = fresh(size, seed, rule)
            for step in range(2):
                for x_BSE in inputs(size, seed + step).chunk(accumulated):
                    layer(x_BSE)
                balanced.update()
            found.append(bias_E.tolist())
        assert found[0] == found[1]

    @often
    @given(sizes, seeds, st.sampled_from(RULES), st.sampled_from([(2, 2), (1, 3), (0, 4), (1, 1, 2)]))
    def test_ranks_of_any_share_move_as_one_does_by_one_collective(self, size, seed, rule, shares) -> None:
        alone, single, alone_E = fresh(size, seed, rule)
        others = [fresh(size, seed, rule, number) for number in range(1, len(shares) + 1)]
        ranks = Ranks(len(shares))
        x_BSE = inputs(size, seed)
        for (layer, *_), part_BSE in zip(others, x_BSE.split(shares), strict=True):
            if len(part_BSE):
                layer(part_BSE)
            else:
                layer(x_BSE, attention_mask=NO_TOKEN_BS)
        with (
            mock.patch.object(balanced_model, "all_reduce_", ranks.all_reduce_),
            ThreadPoolExecutor(len(shares)) as pool,
        ):
            list(pool.map(lambda other: other[1].update(), others))
        alone(x_BSE)
        single.update()
        assert all(torch.equal(bias_E, alone_E) for _, _, bias_E in others)
        assert ranks.collectives == 1

    @often
    @given(sizes, seeds, st.sampled_from(RULES), st.integers(0, 2))
    def test_resumed_rule_continues_exactly(self, size, seed, rule, stop) -> None:
        whole, resumed = fresh(size, seed, rule), fresh(size, seed, rule, number=1)
        for step in range(3):
            if step == stop:
                resumed[1].load_state_dict(whole[1].state_dict())
            for layer, balanced, _ in (whole, resumed) if step >= stop else (whole,):
                layer(inputs(size, seed + step))
                balanced.update()
        assert resumed[1].step == whole[1].step == 3
        assert torch.equal(resumed[2], whole[2])

    @often
    @given(sizes, seeds, st.sampled_from(RULES), st.booleans())
    def test_rejected_step_and_step_without_tokens_leave_no_trace(
        self, size, seed, rule, is_rejected
    ) -> None:
        layer, balanced, bias_E = fresh(size, seed, rule)
        layer(inputs(size, seed))
        balanced.update()
        before, kept = balanced.state_dict()["sites"], bias_E.clone()
        layer(inputs(size, seed + 1), attention_mask=None if is_rejected else NO_TOKEN_BS)
        balanced.reject_if_(torch.tensor(is_rejected))
        balanced.update()
        assert torch.equal(bias_E, kept)
        (now,), (then,) = balanced.state_dict()["sites"].values(), before.values()
        assert {key: value.tolist() for key, value in now["state"].items()} == {
            key: value.tolist() for key, value in then["state"].items()
        }


class TestRule:
    @often
    @given(sizes, seeds, st.integers(2, 1000))
    def test_scaled_counts_change_no_sign_update_and_balanced_counts_change_nothing(
        self, size, seed, factor
    ) -> None:
        counts_E, zeros_E = drawn(seed, size[0]).abs().mul(10).long(), torch.zeros(size[0])
        once_E, scaled_E, balanced_E = (
            SIGN.step(Load(each_E, zeros_E), 1.0, {})
            for each_E in (counts_E, factor * counts_E, torch.full_like(counts_E, factor))
        )
        assert torch.equal(once_E, scaled_E)
        assert not balanced_E.any()

    @often
    @given(st.sampled_from([(1, 1), (2, 2), (5, 5)]), seeds, st.sampled_from(RULES))
    def test_bias_stays_zero_where_there_is_nothing_to_choose(self, size, seed, rule) -> None:
        layer, balanced, bias_E = fresh(size, seed, rule)
        for step in range(2):
            layer(inputs(size, seed + step))
            balanced.update()
        assert not bias_E.any()

    @often
    @given(sizes, seeds)
    def test_sign_balances_fixed_scores_within_range_over_rate(self, size, seed) -> None:
        """MaxVio is averaged over the last steps; ties of the few tokens and the rate's grain are allowed for."""
        num_experts, top_k = size
        rate, tokens, spread = 0.02, 1024, 0.1
        offset_E = drawn(seed, num_experts).clamp(-1, 1) * spread
        scores_TE = offset_E + drawn(seed + 1, tokens, num_experts)
        bias_E, mean = torch.zeros(num_experts), tokens * top_k / num_experts
        steps = math.ceil(2 * spread / rate) + 20
        violations = []
        for _ in range(steps):
            counts_E = torch.bincount(
                (scores_TE + bias_E).topk(top_k).indices.flatten(), minlength=num_experts
            )
            violations.append(counts_E.max().item() / mean - 1)
            bias_E += SIGN.step(Load(counts_E, bias_E), rate, {})
        assert sum(violations[-16:]) / 16 < 0.1
