from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_plugin.experts.kernels import row_batches as batches_file
from moe_plugin.experts.kernels.row_batches import ALONE, FILLED, ROWS, batches, lay_out

LOADS = st.lists(st.one_of(st.integers(0, 300), st.integers(0, 9000)), min_size=1, max_size=40)


class TestBatches:
    @settings(max_examples=200, deadline=None)
    @given(loads=LOADS)
    def test_every_expert_with_a_pair_is_in_one_batch_that_it_fills(self, loads):
        found = batches(loads)
        assert sorted(expert for batch in found for expert in batch.experts) == [
            expert for expert, load in enumerate(loads) if load
        ]
        pair = row = 0
        for batch in found:
            size = len(batch.experts)
            assert batch.loads == [loads[expert] for expert in batch.experts]
            assert max(batch.loads) <= batch.height < 1.07 * max(batch.loads) + 8
            assert size & (size - 1) == 0
            if size > 1:
                assert batch.height <= ALONE
                assert size * batch.height <= ROWS
                assert min(batch.loads) >= FILLED * batch.height
            assert (batch.pairs.start, batch.rows.start) == (pair, row)
            pair, row = pair + sum(batch.loads), row + size * batch.height
            assert (batch.pairs.stop, batch.rows.stop) == (pair, row)

    def test_loads_that_wander_meet_few_shapes_of_products(self):
        torch.manual_seed(0)
        shapes = set()
        for _ in range(200):
            loads = torch.multinomial(torch.ones(64), 4096 * 8, replacement=True).bincount(minlength=64)
            shapes |= {(len(batch.experts), batch.height) for batch in batches(loads.tolist())}
        assert len(shapes) < 40  # of 200 * 64 products, nearly all would have a number of rows of their own


class TestLayOut:
    @settings(max_examples=100, deadline=None)
    @given(loads=LOADS, rows=st.sampled_from([16, 4096]))
    def test_rows_of_an_expert_are_its_pairs_and_padding_repeats_its_first(self, loads, rows):
        ends = torch.tensor(loads).cumsum(0).tolist()
        pair_ids_P = torch.randperm(ends[-1])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(batches_file, "ROWS", rows)
            layout = lay_out(pair_ids_P, ends)
        shown_N = layout.pair_ids_P[layout.sources_N].tolist()
        assert torch.equal(layout.pair_ids_P, torch.tensor(shown_N, dtype=torch.int64)[layout.rows_P])
        for batch in layout.batches:
            for nth, expert in enumerate(batch.experts):
                row = batch.rows.start + nth * batch.height
                theirs = pair_ids_P[ends[expert] - loads[expert] : ends[expert]].tolist()
                padding = [theirs[0]] * (batch.height - loads[expert])
                assert shown_N[row : row + batch.height] == theirs + padding

    def test_no_pair_gives_no_batch(self):
        layout = lay_out(torch.empty(0, dtype=torch.int64), [0, 0])
        assert layout.batches == []
        assert len(layout.rows_P) == len(layout.sources_N) == 0
