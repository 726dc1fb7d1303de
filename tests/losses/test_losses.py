from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_plugin.errors import ConfigError
from moe_plugin.losses import GlobalBatchLoss, LoadBalancingLoss, RouterZLoss, SequenceLoss, TotalLoss
from tests.losses.routed import Gate, S, slow_load, statistics_of

KINDS = [LoadBalancingLoss, SequenceLoss, GlobalBatchLoss, RouterZLoss]
kinds = pytest.mark.parametrize("kind", KINDS)
BALANCING = [LoadBalancingLoss, SequenceLoss, GlobalBatchLoss]
sizes = given(
    st.integers(1, 3), st.integers(1, 4), st.integers(3, 8), st.integers(1, 2), st.integers(0, 10**6)
)


def logits_of(tokens, experts, seed):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


def batches(sequences=8):
    return torch.randn(sequences * S, 4, generator=torch.Generator().manual_seed(3))


def gradient_of(loss, x_TD, parts):
    """Of a window of `parts` micro-batches, each loss divided as Lightning does."""
    gate = Gate()
    loss.start_window_()
    for part_TD in x_TD.chunk(parts):
        (loss(gate.statistics(part_TD)) / parts).backward()
    return gate.gradient()


class TestValue:
    @settings(max_examples=200, deadline=None)
    @sizes
    def test_batch_losses_equal_plain_python(self, sequences, length, experts, top_k, seed):
        logits_TE = logits_of(sequences * length, experts, seed)
        expected = 0.5 * slow_load(logits_TE.tolist(), top_k)
        for kind in (LoadBalancingLoss, GlobalBatchLoss):
            assert kind(0.5)([statistics_of(logits_TE, sequences, top_k)]).item() == pytest.approx(
                expected, rel=1e-5
            )

    @settings(max_examples=200, deadline=None)
    @sizes
    def test_sequence_loss_is_the_mean_over_sequences(self, sequences, length, experts, top_k, seed):
        logits_TE = logits_of(sequences * length, experts, seed)
        by_sequence = [slow_load(part.tolist(), top_k) for part in logits_TE.split(length)]
        actual = SequenceLoss(0.5)([statistics_of(logits_TE, sequences, top_k)]).item()
        assert actual == pytest.approx(0.5 * sum(by_sequence) / sequences, rel=1e-5)

    @settings(max_examples=200, deadline=None)
    @sizes
    def test_z_loss_equals_plain_python(self, sequences, length, experts, top_k, seed):
        logits_TE = logits_of(sequences * length, experts, seed)
        squares = [math.log(sum(map(math.exp, row))) ** 2 for row in logits_TE.tolist()]
        actual = RouterZLoss(0.5)([statistics_of(logits_TE, sequences, top_k)]).item()
        assert actual == pytest.approx(0.5 * sum(squares) / len(squares), rel=1e-5)

    @pytest.mark.parametrize("kind", BALANCING)
    def test_uniform_routing_costs_the_coefficient(self, kind):
        logits_TE = 1e-4 * torch.eye(8).repeat(2, 1)
        assert kind(0.01)([statistics_of(logits_TE, 2, 1)]).item() == pytest.approx(0.01, rel=1e-3)

    @pytest.mark.parametrize("kind", BALANCING)
    def test_one_expert_costs_coefficient_times_experts(self, kind):
        logits_TE = torch.zeros(4, 8).index_fill(1, torch.tensor([3]), 100.0)
        assert kind(0.01)([statistics_of(logits_TE, 2, 1)]).item() == pytest.approx(0.08)

    @pytest.mark.parametrize("kind", BALANCING)
    def test_gradient_lowers_the_loaded_expert(self, kind):
        logits_TE = torch.zeros(4, 8).index_fill(1, torch.tensor([3]), 0.1).requires_grad_()
        kind(1.0)([statistics_of(logits_TE, 2, 1)]).backward()
        assert (logits_TE.grad[:, 3] > 0).all()
        assert (logits_TE.grad[:, :3] < 0).all()

    @kinds
    def test_layers_are_added(self, kind):
        layers = Gate().statistics(batches())
        torch.testing.assert_close(kind(0.5)(layers), sum(kind(0.5)([layer]) for layer in layers))

    @kinds
    @pytest.mark.parametrize("coefficient", [-0.01, float("nan"), float("inf"), True])
    def test_bad_coefficient_is_refused(self, kind, coefficient):
        with pytest.raises(ConfigError, match=f"'coefficient' must be a number >= 0, got {coefficient}"):
            kind(coefficient)

    def test_total_is_the_sum(self):
        layers, losses = Gate().statistics(batches()), {kind.__name__: kind(0.5) for kind in KINDS}
        expected = sum(loss(layers) for loss in losses.values())
        for loss in losses.values():
            loss.start_window_()
        torch.testing.assert_close(TotalLoss(losses)(layers), expected)


class TestAccumulation:
    @kinds
    @pytest.mark.parametrize("parts", [1, 2, 4])
    def test_equal_micro_batches_give_the_gradient_of_one(self, kind, parts):
        x_TD = batches(2)
        whole = gradient_of(kind(0.5), x_TD, 1)
        torch.testing.assert_close(gradient_of(kind(0.5), x_TD.repeat(parts, 1), parts), whole)

    @pytest.mark.parametrize("kind", [SequenceLoss, RouterZLoss])
    @pytest.mark.parametrize("parts", [2, 4])
    def test_split_of_a_batch_changes_nothing(self, kind, parts):
        torch.testing.assert_close(
            gradient_of(kind(0.5), batches(), parts), gradient_of(kind(0.5), batches(), 1)
        )

    @pytest.mark.parametrize("parts", [2, 4])
    def test_global_batch_uses_the_counts_of_the_window_so_far(self, parts):
        gate, counts_LE, x_TD = Gate(), 0, batches()
        for part_TD in x_TD.chunk(parts):
            layers = gate.statistics(part_TD)
            counts_LE = counts_LE + torch.stack([layer.counts_BE.sum(0) for layer in layers])
            share_LE = counts_LE / counts_LE.sum(-1, keepdim=True)
            probability_LE = torch.stack([layer.probability_BE.mean(0) for layer in layers])
            (0.5 / parts * share_LE.shape[-1] * (share_LE * probability_LE).sum()).backward()
        torch.testing.assert_close(gradient_of(GlobalBatchLoss(0.5), x_TD, parts), gate.gradient())

    def test_global_batch_forgets_the_last_window(self):
        loss = GlobalBatchLoss(0.5)
        first = gradient_of(loss, batches(), 2)
        assert torch.equal(gradient_of(loss, batches(), 2), first)

    def test_validation_leaves_the_window_alone(self):
        loss, gate = GlobalBatchLoss(0.5), Gate()
        expected = loss(gate.statistics(batches()))
        loss.start_window_()
        with torch.no_grad():
            loss(gate.statistics(batches().flip(1)))
        assert torch.equal(loss(gate.statistics(batches())), expected)


def gradients_on_ranks(rank, results, parts):
    mine_TD = batches().chunk(2)[rank]
    by_kind = {}
    for kind in KINDS:
        gradient = gradient_of(kind(0.5), mine_TD, parts)
        dist.all_reduce(gradient)
        by_kind[kind.__name__] = (gradient / 2).tolist()
    results[rank] = by_kind


class TestRanks:
    """Gradients are averaged over ranks, as DDP does."""

    def test_two_ranks_give_the_gradient_of_one_process(self, on_ranks):
        results = on_ranks(2, gradients_on_ranks, 1)
        for kind in (SequenceLoss, GlobalBatchLoss, RouterZLoss):
            expected = gradient_of(kind(0.5), batches(), 1)
            torch.testing.assert_close(torch.tensor(results[0][kind.__name__]), expected)

    @pytest.mark.parametrize("parts", [2, 4])
    def test_accumulation_on_ranks_is_accumulation_in_one_process(self, parts, on_ranks):
        results = on_ranks(2, gradients_on_ranks, parts)
        for kind in (LoadBalancingLoss, SequenceLoss, RouterZLoss):
            expected = gradient_of(kind(0.5), batches(), 2 * parts)
            torch.testing.assert_close(torch.tensor(results[1][kind.__name__]), expected)

    @pytest.mark.parametrize("parts", [2, 4])
    def test_global_batch_on_ranks_and_accumulation_sums_both(self, parts, on_ranks):
        results = on_ranks(2, gradients_on_ranks, parts)
        first, second = (half.chunk(parts) for half in batches().chunk(2))
        together = torch.cat([torch.cat(pair) for pair in zip(first, second, strict=True)])
        expected = gradient_of(GlobalBatchLoss(0.5), together, parts)
        torch.testing.assert_close(torch.tensor(results[0]["GlobalBatchLoss"]), expected)


class TestStatistics:
    def test_no_token_costs_nothing(self):
        layers = [statistics_of(torch.zeros(0, 8), 2)]
        assert all(kind(0.5)(layers).item() == 0 for kind in KINDS)

    def test_counts_are_per_sequence(self):
        statistics = statistics_of(torch.eye(4), 2, 1)
        assert statistics.counts_BE.tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
