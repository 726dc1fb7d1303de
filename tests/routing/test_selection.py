from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_plugin.routing import limit_to_groups, select_top_k


def allowed_groups_reference(biased_E: list[float], num_groups: int, top_k_groups: int) -> set[int]:
    """The chosen groups of one token, by sorting Python lists."""
    size = len(biased_E) // num_groups
    groups = [sorted(biased_E[g * size : (g + 1) * size], reverse=True) for g in range(num_groups)]
    order = sorted(range(num_groups), key=lambda g: groups[g][0] + groups[g][1], reverse=True)
    return set(order[:top_k_groups])


def limit_by_sorting(biased_TE: torch.Tensor, num_groups: int, top_k_groups: int) -> torch.Tensor:
    """`limit_to_groups` with the two best of each group found by `topk`."""
    grouped_TGM = biased_TE.unflatten(-1, (num_groups, -1))
    groups = grouped_TGM.topk(2, dim=-1).values.sum(-1).topk(top_k_groups, dim=-1, sorted=False).indices
    inside_TG = torch.zeros(grouped_TGM.shape[:-1], dtype=torch.bool).scatter(-1, groups, True)
    return grouped_TGM.masked_fill(~inside_TG.unsqueeze(-1), -torch.inf).flatten(-2)


class TestSelectTopK:
    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 2**31), top_k=st.integers(1, 8))
    def test_random_scores_select_the_highest(self, seed, top_k):
        biased_TE = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))
        ids_TK = select_top_k(biased_TE, top_k)
        for token, ids in enumerate(ids_TK.tolist()):
            row = biased_TE[token].tolist()
            assert ids == sorted(range(8), key=lambda e, row=row: row[e], reverse=True)[:top_k]

    def test_all_tied_selects_distinct_experts(self):
        ids_TK = select_top_k(torch.zeros(4, 8), 3)
        assert all(len(set(ids)) == 3 for ids in ids_TK.tolist())

    def test_nan_gives_valid_ids(self):
        ids_TK = select_top_k(torch.full((2, 8), torch.nan), 3)
        assert ids_TK.min() >= 0
        assert ids_TK.max() < 8

    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 2**31), shift=st.sampled_from([-2.0, -0.5, 0.25, 4.0]))
    def test_constant_added_to_all_biases_selects_the_same(self, seed, shift):
        # Multiples of 1/1024, so that adding the constant is exact.
        biased_TE = torch.randint(0, 1024, (5, 8), generator=torch.Generator().manual_seed(seed)) / 1024
        assert torch.equal(select_top_k(biased_TE, 3), select_top_k(biased_TE + shift, 3))


class TestLimitToGroups:
    @settings(max_examples=50, deadline=None)
    @given(
        seed=st.integers(0, 2**31),
        num_groups=st.sampled_from([2, 4, 8]),
        size=st.integers(2, 5),
        data=st.data(),
    )
    def test_random_scores_keep_the_best_groups(self, seed, num_groups, size, data):
        top_k_groups = data.draw(st.integers(1, num_groups))
        biased_TE = torch.randn(3, num_groups * size, generator=torch.Generator().manual_seed(seed))
        limited_TE = limit_to_groups(biased_TE, num_groups, top_k_groups)
        for token in range(3):
            chosen = allowed_groups_reference(biased_TE[token].tolist(), num_groups, top_k_groups)
            for expert in range(num_groups * size):
                kept = biased_TE[token, expert] if expert // size in chosen else -torch.inf
                assert limited_TE[token, expert] == kept

    @settings(max_examples=60, deadline=None)
    @given(
        seed=st.integers(0, 2**31),
        num_groups=st.sampled_from([2, 4, 8]),
        size=st.integers(2, 9),
        levels=st.sampled_from([2, 5, 2**20]),
        special=st.sampled_from([None, torch.nan, torch.inf, -torch.inf]),
        data=st.data(),
    )
    def test_any_scores_equal_sorting_bit_for_bit(self, seed, num_groups, size, levels, special, data):
        top_k_groups = data.draw(st.integers(1, num_groups))
        generator = torch.Generator().manual_seed(seed)
        # Few levels make many ties; thirds make sums that round.
        biased_TE = torch.randint(-levels, levels, (6, num_groups * size), generator=generator) / 3
        if special is not None:
            biased_TE[torch.rand(biased_TE.shape, generator=generator) < 0.1] = special
        expected_TE = limit_by_sorting(biased_TE, num_groups, top_k_groups)
        limited_TE = limit_to_groups(biased_TE, num_groups, top_k_groups)
        assert torch.equal(limited_TE.view(torch.int32), expected_TE.view(torch.int32))
        assert torch.equal(select_top_k(limited_TE, 2), select_top_k(expected_TE, 2))

    def test_best_tied_within_a_group_counts_twice(self):
        # Sums of two best: 2.0 and 1.9. Counting a tied best once would make it 1.0 + 0.0.
        biased_TE = torch.tensor([[1.0, 1.0, 0.0, 1.5, 0.4, 0.4]])
        assert limit_to_groups(biased_TE, 2, 1)[0].tolist() == [1.0, 1.0, 0.0] + [-torch.inf] * 3

    def test_groups_all_tied_keep_exactly_top_k_groups(self):
        limited_TE = limit_to_groups(torch.zeros(2, 8), 4, 2)
        assert limited_TE.isfinite().sum(-1).tolist() == [4, 4]

    def test_negative_scores_do_not_leak_outside(self):
        limited_TE = limit_to_groups(-torch.rand(16, 16) - 1, 4, 2)
        ids_TK = select_top_k(limited_TE, 8)
        assert limited_TE.gather(-1, ids_TK).isfinite().all()

    def test_nan_token_leaves_other_tokens_alone(self):
        biased_TE = torch.randn(2, 8)
        biased_TE[0, 3] = torch.nan
        limited_TE = limit_to_groups(biased_TE, 4, 2)
        assert torch.equal(limited_TE[1], limit_to_groups(biased_TE[1:], 4, 2)[0])
        assert (select_top_k(limited_TE, 4) < 8).all()

    @pytest.mark.parametrize("num_groups", [2, 4])
    def test_all_groups_allowed_changes_nothing(self, num_groups):
        biased_TE = torch.randn(5, 16)
        assert torch.equal(limit_to_groups(biased_TE, num_groups, num_groups), biased_TE)
