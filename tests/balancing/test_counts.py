from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_plugin.balancing.counts import (
    EXTRA_SLOTS,
    SPREAD_UNIT,
    count_,
    expert_counts,
    new_tally,
    num_rejected,
    num_seen,
    num_tokens,
    reject_if_,
    spread_sum,
)

NUM_EXPERTS = 5


def slow_counts(expert_ids_TK, valid_T=None):
    counts = [0] * NUM_EXPERTS
    for token, ids in enumerate(expert_ids_TK.tolist()):
        for expert in ids:
            counts[expert] += 1 if valid_T is None else int(valid_T[token])
    return counts


class CountingLayer(nn.Module):
    """A layer that counts fixed selections, to see when a forward counts."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.tally = new_tally(NUM_EXPERTS)
        self.ids_TK = torch.tensor([[0, 1], [1, 2], [4, 1]])

    def forward(self, x):
        count_(self.tally, self.ids_TK, torch.ones(3, 2), training=self.training)
        return self.linear(x).relu()


class TestCount:
    @settings(max_examples=100, deadline=None)
    @given(st.data())
    def test_any_selection_equals_slow_loop(self, data):
        tokens = data.draw(st.integers(0, 20))
        row = st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=2, max_size=2)
        rows = data.draw(st.lists(row, min_size=tokens, max_size=tokens))
        ids_TK = torch.tensor(rows, dtype=torch.int64).reshape(tokens, 2)
        valid = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
        valid_T = torch.tensor(valid, dtype=torch.bool)
        tally = new_tally(NUM_EXPERTS)
        count_(tally, ids_TK, torch.ones(tokens, 2), valid_T=valid_T, training=False)
        assert tally[:NUM_EXPERTS].tolist() == slow_counts(ids_TK, valid_T)
        assert tally[:NUM_EXPERTS].sum() == 2 * sum(valid)
        assert tally[NUM_EXPERTS + 1] == 2 * tokens

    def test_counts_beyond_float_precision_stay_exact(self):
        tally = new_tally(NUM_EXPERTS)
        tally[0] = 2**53
        count_(tally, torch.tensor([[0]]), torch.ones(1, 1), training=False)
        assert tally[0] == 2**53 + 1

    @pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_non_finite_score_of_a_real_token_is_told(self, odd, dtype):
        ids_TK, valid_T = torch.zeros(3, 2, dtype=torch.int64), torch.tensor([True, True, False])
        selected_TK = torch.tensor([[1.0, 3.0], [-2.0, 1.0], [odd, odd]], dtype=dtype)
        padding, real = new_tally(NUM_EXPERTS), new_tally(NUM_EXPERTS)
        count_(padding, ids_TK, selected_TK, valid_T=valid_T, training=False)
        assert padding[: NUM_EXPERTS + 1].tolist() == [4, 0, 0, 0, 0, 0]
        selected_TK[1, 0] = odd
        count_(real, ids_TK, selected_TK, valid_T=valid_T, training=False)
        assert real[: NUM_EXPERTS + 1].tolist() == [3, 0, 0, 0, 0, 1]

    def test_many_large_half_precision_scores_are_finite(self):
        tally, large_TK = new_tally(NUM_EXPERTS), torch.full((3, 2), 60000.0, dtype=torch.float16)
        count_(tally, torch.zeros(3, 2, dtype=torch.int64), large_TK, training=False)
        assert tally[: NUM_EXPERTS + 1].tolist() == [6, 0, 0, 0, 0, 0]

    def test_spread_leaves_masked_experts_out(self):
        tally = new_tally(4)
        scores_TE = torch.tensor([[1.0, 3.0, -torch.inf, 0.0]])
        count_(tally, torch.tensor([[1]]), torch.ones(1, 1), scores_TE=scores_TE, training=False)
        assert tally[4 + 3].item() / SPREAD_UNIT == pytest.approx(1.0)
        assert tally.numel() == 4 + EXTRA_SLOTS


class TestRecompute:
    def forward(self, kind: str, x):
        layer = CountingLayer()
        if kind == "plain":
            return layer, layer(x)
        return layer, checkpoint(layer, x, use_reentrant=kind == "reentrant")

    @pytest.mark.parametrize("kind", ["plain", "reentrant", "non-reentrant"])
    def test_forward_and_backward_count_once(self, kind):
        layer, y = self.forward(kind, torch.ones(3, 4, requires_grad=True))
        y.sum().backward()
        assert layer.tally[:NUM_EXPERTS].tolist() == slow_counts(layer.ids_TK)

    def test_nested_checkpoints_count_once(self):
        layer = CountingLayer()
        x = torch.ones(3, 4, requires_grad=True)

        def inner(x):
            return checkpoint(layer, x, use_reentrant=False)

        checkpoint(inner, x, use_reentrant=False).sum().backward()
        assert layer.tally[:NUM_EXPERTS].tolist() == slow_counts(layer.ids_TK)

    @pytest.mark.parametrize("kind", ["plain", "reentrant", "non-reentrant"])
    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
    def test_no_grad_counts_nothing_in_training(self, kind):
        with torch.no_grad():
            layer, _ = self.forward(kind, torch.ones(3, 4))
        assert layer.tally.sum() == 0

    def test_evaluation_counts_without_grad(self):
        layer = CountingLayer().eval()
        with torch.no_grad():
            layer(torch.ones(3, 4))
        assert layer.tally[:NUM_EXPERTS].tolist() == slow_counts(layer.ids_TK)

    @pytest.mark.parametrize("kind", ["plain", "reentrant", "non-reentrant"])
    def test_compiled_layer_counts_once(self, kind):
        layer = CountingLayer()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for _ in range(3):
            x = torch.ones(3, 4, requires_grad=True)
            y = compiled(x) if kind == "plain" else checkpoint(compiled, x, use_reentrant=kind == "reentrant")
            y.sum().backward()
        assert layer.tally[:NUM_EXPERTS].tolist() == [3 * c for c in slow_counts(layer.ids_TK)]

    def test_checkpoint_inside_compiled_function_counts_once(self):
        layer = CountingLayer()

        @torch.compile(fullgraph=True, backend="aot_eager")
        def step(x):
            return checkpoint(layer, x, use_reentrant=False).sum()

        step(torch.ones(3, 4, requires_grad=True)).backward()
        assert layer.tally[:NUM_EXPERTS].tolist() == slow_counts(layer.ids_TK)


class TestSlots:
    def test_each_slot_is_read_by_its_name(self):
        """One forward with a masked token, an infinite score, a token that uses one expert only, and a rejection."""
        slots_S = new_tally(NUM_EXPERTS)
        ids_TK = torch.tensor([[0, 1], [1, 2], [4, 3], [2, 3]])
        selected_TK = torch.tensor([[1.0, 1.0], [1.0, torch.inf], [1.0, 1.0], [1.0, 1.0]])
        used_TK = torch.tensor([[True, True], [True, True], [True, False], [True, True]])
        valid_T = torch.tensor([True, True, True, False])
        scores_TE = torch.tensor([[1.0, 3.0, 1.0, 3.0, 2.0]] * 4)
        count_(
            slots_S,
            ids_TK,
            selected_TK,
            scores_TE=scores_TE,
            valid_T=valid_T,
            used_TK=used_TK,
            training=False,
        )
        assert expert_counts(slots_S).tolist() == [1, 2, 0, 0, 1]
        assert num_tokens(slots_S) == 3
        assert (
            num_seen(slots_S) == 4 + 1 + 8
        )  # counted, infinite, and all of the forward because it was masked
        assert spread_sum(slots_S) / SPREAD_UNIT == pytest.approx(3 * 0.8**0.5)
        assert num_rejected(slots_S) == 1
        reject_if_(slots_S, torch.tensor(False))
        assert num_rejected(slots_S) == 1
        reject_if_(slots_S, torch.tensor(True))
        assert num_rejected(slots_S) == 2
        assert expert_counts(slots_S).tolist() == [1, 2, 0, 0, 1]

    def test_several_tallies_are_read_at_once(self):
        slots_LS = torch.arange(2 * (NUM_EXPERTS + EXTRA_SLOTS)).view(2, -1)
        for read in (expert_counts, num_seen, num_tokens, spread_sum, num_rejected):
            assert torch.equal(read(slots_LS), torch.stack([read(slots_S) for slots_S in slots_LS]))
