from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_plugin.apps.data.sequences import cut, shares


def streams(*lengths):
    return {f"d{i}": torch.arange(n, dtype=torch.int32) + 1000 * i for i, n in enumerate(lengths)}


class TestCut:
    def test_sequences_are_consecutive_and_of_one_domain(self):
        sequences = cut(streams(11, 9), ["d0", "d1"], context_length=3)
        assert sequences.tokens.tolist() == [
            [0, 1, 2, 3],
            [4, 5, 6, 7],
            [1000, 1001, 1002, 1003],
            [1004, 1005, 1006, 1007],
        ]
        assert sequences.domain.tolist() == [0, 0, 1, 1]

    def test_batch_is_int64(self):
        batch = cut({"d": torch.arange(20, dtype=torch.uint8)}, ["d"], 4).batch(torch.tensor([2, 0]))
        assert batch["tokens"].dtype == batch["domain"].dtype == torch.int64
        assert batch["tokens"].tolist() == [[10, 11, 12, 13, 14], [0, 1, 2, 3, 4]]


class TestThinned:
    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(1, 100))
    def test_any_limit_keeps_the_mix_without_repeats(self, counts, keep):
        sequences = cut(streams(*(2 * n for n in counts)), [f"d{i}" for i in range(len(counts))], 1)
        thinned = sequences.thinned(keep)
        assert len(thinned.tokens) == min(keep, sum(counts))
        assert len(thinned.tokens.unique(dim=0)) == len(thinned.tokens)
        kept = torch.bincount(thinned.domain, minlength=len(counts)).tolist()
        assert all(
            abs(k - len(thinned.tokens) * n / sum(counts)) <= 1 for k, n in zip(kept, counts, strict=True)
        )

    def test_kept_sequences_are_spread_over_the_stream(self):
        thinned = cut(streams(200), ["d0"], 1).thinned(10)
        assert thinned.tokens[:, 0].tolist() == list(range(0, 200, 20))


class TestShares:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.data())
    def test_shares_sum_to_keep_within_counts(self, counts, data):
        keep = data.draw(st.integers(0, sum(counts)))
        quotas = shares(counts, keep)
        assert sum(quotas) == keep
        assert all(0 <= q <= n for q, n in zip(quotas, counts, strict=True))
