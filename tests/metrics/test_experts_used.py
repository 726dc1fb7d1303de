from __future__ import annotations

import math
from collections import Counter
from statistics import fmean

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_plugin.metrics.experts_used import (
    ExpertsUsed,
    loss_bins,
    loss_correlation,
    loss_correlation_in_place,
    mean_used,
    position_bins,
    rank_correlation,
    used_by_loss,
)

LAYERS, MOST, KINDS = 2, 4, 3


def tokens(count=600, seed=0):
    """Tokens with one kind, whose experts follow their loss in the first layer and nothing in the second."""
    generator = torch.Generator().manual_seed(seed)
    losses_T = torch.rand(count, generator=generator) * 6
    first_T = (losses_T / 2 + torch.rand(count, generator=generator)).long().clamp(max=MOST)
    second_T = torch.randint(0, MOST + 1, (count,), generator=generator)
    kinds_T = torch.randint(-1, KINDS, (count,), generator=generator)
    positions_T = torch.arange(count) % 100
    return torch.stack([first_T, second_T]), kinds_T, losses_T, positions_T


def counted(batches=3):
    counts, seen = ExpertsUsed(LAYERS, MOST, {"kind": KINDS}), []
    for seed in range(batches):
        used_LT, kinds_T, losses_T, positions_T = tokens(seed=seed)
        counts.add_(used_LT, {"kind": kinds_T}, losses_T, positions_T)
        rows = zip(used_LT.T.tolist(), kinds_T.tolist(), losses_T.tolist(), positions_T.tolist(), strict=True)
        seen += list(rows)
    return counts, seen


def slow_ranks(values):
    """The mean rank of each value among all, by looking at every pair."""
    return [
        sum(other < value for other in values) + sum(other == value for other in values) / 2
        for value in values
    ]


def slow_correlation(xs, ys):
    return np.corrcoef(slow_ranks(xs), slow_ranks(ys))[0, 1]


class TestCounts:
    def test_tables_equal_a_loop_over_tokens(self):
        counts, seen = counted()
        for layer in range(LAYERS):
            numbers = Counter(used[layer] for used, *_ in seen)
            assert counts.tokens_LU[layer].tolist() == [numbers[number] for number in range(MOST + 1)]
            for kind in range(KINDS):
                means = fmean(used[layer] for used, its_kind, *_ in seen if its_kind == kind)
                assert mean_used(counts.by_kind["kind"])[layer, kind].item() == pytest.approx(means)

    def test_batches_add_up_to_one_batch(self):
        parts = [tokens(seed=seed) for seed in range(3)]
        whole = ExpertsUsed(LAYERS, MOST, {"kind": KINDS})
        used, *others = (torch.cat(each, dim=-1) for each in zip(*parts, strict=True))
        whole.add_(used, {"kind": others[0]}, *others[1:])
        assert torch.equal(whole.by_loss_LPUB, counted()[0].by_loss_LPUB)

    def test_tokens_without_a_finite_loss_are_left_out_of_the_losses_only(self):
        counts = ExpertsUsed(1, 2, {})
        counts.add_(torch.tensor([[1, 2]]), {}, torch.tensor([math.nan, 1.0]), torch.tensor([0, 1]))
        assert counts.tokens_LU.tolist() == [[0, 1, 1]]
        assert counts.by_loss_LPUB.sum() == 1


class TestCorrelation:
    def test_equals_that_of_the_tokens_by_pairs(self):
        counts, seen = counted(1)
        binned = loss_bins(torch.tensor([loss for *_, loss, _ in seen])).tolist()
        for layer in range(LAYERS):
            expected = slow_correlation([used[layer] for used, *_ in seen], binned)
            assert loss_correlation(counts.by_loss_LPUB)[layer].item() == pytest.approx(expected, abs=1e-12)
            # The ranges of loss are fine enough for the ranks.
            exact = slow_correlation([used[layer] for used, *_ in seen], [loss for *_, loss, _ in seen])
            assert expected == pytest.approx(exact, abs=0.01)

    def test_in_place_compares_tokens_of_like_positions_only(self):
        counts, seen = counted(1)
        for layer in range(LAYERS):
            total = 0.0
            for first, last in ((0, 0), (1, 2), (3, 6), (7, 14), (15, 30), (31, 62), (63, 99)):
                group = [row for row in seen if first <= row[3] <= last]
                binned = loss_bins(torch.tensor([loss for *_, loss, _ in group])).tolist()
                total += len(group) * slow_correlation([used[layer] for used, *_ in group], binned)
            assert loss_correlation_in_place(counts.by_loss_LPUB)[layer].item() == pytest.approx(
                total / len(seen), abs=1e-12
            )

    def test_what_comes_from_position_alone_is_gone_in_place(self):
        positions_T = torch.arange(400) % 100
        early_T = positions_T < 31  # an edge of the ranges
        losses_T = early_T * 4 + torch.rand(400)
        counts = ExpertsUsed(1, 2, {})
        noise_T = torch.rand(400) < 0.2
        counts.add_(((early_T ^ noise_T).long() + 1)[None], {}, losses_T, positions_T)
        assert loss_correlation(counts.by_loss_LPUB).item() > 0.4
        assert abs(loss_correlation_in_place(counts.by_loss_LPUB).item()) < 0.2

    def test_constant_number_has_none(self):
        assert rank_correlation(torch.tensor([[3, 4], [0, 0]])).isnan()

    @settings(deadline=None, max_examples=30)
    @given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=3, max_size=30))
    def test_any_table_equals_pairs(self, pairs):
        table = torch.zeros(4, 6, dtype=torch.int64)
        for row, column in pairs:
            table[row, column] += 1
        xs, ys = zip(*pairs, strict=True)
        if len(set(xs)) > 1 and len(set(ys)) > 1:
            assert rank_correlation(table).item() == pytest.approx(slow_correlation(xs, ys), abs=1e-9)


class TestByLoss:
    def test_parts_hold_all_tokens_in_the_order_of_their_loss(self):
        counts, seen = counted()
        losses_Q, means_LQ = used_by_loss(counts.by_loss_LPUB, parts=5)
        assert losses_Q.tolist() == sorted(losses_Q.tolist())
        ranked = sorted(seen, key=lambda row: row[2])
        for layer in range(LAYERS):
            fifths = [ranked[len(ranked) * part // 5 : len(ranked) * (part + 1) // 5] for part in range(5)]
            for part, rows in enumerate(fifths):
                assert means_LQ[layer, part].item() == pytest.approx(
                    fmean(row[0][layer] for row in rows), abs=0.1
                )
                assert losses_Q[part].item() == pytest.approx(fmean(row[2] for row in rows), rel=0.1)


class TestRanges:
    def test_losses_outside_fall_into_the_ends(self):
        assert loss_bins(torch.tensor([0.0, 1e-9, 1.0, 1000.0])).tolist() == [0, 0, 160, 255]

    def test_positions_double(self):
        assert position_bins(torch.tensor([0, 1, 2, 3, 6, 7, 127, 5000])).tolist() == [0, 1, 1, 2, 2, 3, 7, 7]
