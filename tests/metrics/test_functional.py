from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_plugin.metrics import dead_experts, load_entropy, max_violation, stack_layers

loads = st.lists(st.integers(min_value=0, max_value=10**14), min_size=1, max_size=40)
ragged = st.lists(st.lists(st.integers(0, 10**6), min_size=1, max_size=9), min_size=1, max_size=6)


def violation_reference(load: list[int]) -> float:
    mean = Fraction(sum(load), len(load))
    return float((max(load) - mean) / mean) if mean else 0.0


def entropy_reference(load: list[int]) -> float:
    if not sum(load) or len(load) == 1:
        return 1.0
    shares = [Fraction(tokens, sum(load)) for tokens in load if tokens]
    return -math.fsum(float(share) * math.log(share) for share in shares) / math.log(len(load))


class TestMaxViolation:
    @settings(max_examples=200, deadline=None)
    @given(loads)
    def test_any_load_equals_the_exact_ratio(self, load):
        assert max_violation(torch.tensor(load)).item() == violation_reference(load)

    def test_counts_beyond_fp32_keep_the_last_token(self):
        counts = torch.tensor([2**30 + 1, 2**30])
        assert max_violation(counts).item() == float(Fraction(1, 2**31 + 1))

    def test_all_tokens_on_one_expert_is_e_minus_1(self):
        assert max_violation(torch.tensor([0, 0, 7, 0])).item() == 3.0

    def test_no_tokens_is_zero_not_nan(self):
        assert max_violation(torch.zeros(3, 4, dtype=torch.int64)).tolist() == [0.0, 0.0, 0.0]

    @settings(max_examples=50, deadline=None)
    @given(loads, st.integers(1, 1000), st.randoms())
    def test_scaled_and_permuted_load_has_the_same_violation(self, load, factor, random):
        shuffled = [tokens * factor for tokens in random.sample(load, len(load))]
        assert max_violation(torch.tensor(shuffled)) == pytest.approx(
            violation_reference(load), rel=1e-15, abs=1e-15
        )

    def test_int32_counts_do_not_overflow(self):
        counts = torch.full((4,), 2**30, dtype=torch.int32)
        assert max_violation(counts).item() == 0.0


class TestLoadEntropy:
    @settings(max_examples=100, deadline=None)
    @given(loads)
    def test_any_load_equals_the_reference(self, load):
        assert load_entropy(torch.tensor(load)).item() == pytest.approx(entropy_reference(load), abs=1e-12)

    def test_even_load_is_one_and_single_expert_load_is_zero(self):
        assert load_entropy(torch.tensor([[5, 5, 5], [0, 9, 0]])).tolist() == pytest.approx([1.0, 0.0])

    def test_no_tokens_or_one_expert_is_one_not_nan(self):
        assert load_entropy(torch.zeros(2, 3, dtype=torch.int64)).tolist() == [1.0, 1.0]
        assert load_entropy(torch.tensor([8])).item() == 1.0


class TestDeadExperts:
    @settings(max_examples=50, deadline=None)
    @given(loads)
    def test_any_load_equals_the_zeros_counted(self, load):
        assert dead_experts(torch.tensor(load)).item() == load.count(0)


class TestRaggedLayers:
    @settings(max_examples=100, deadline=None)
    @given(ragged)
    def test_padded_rows_equal_each_layer_alone(self, layers):
        counts_LE = stack_layers({f"layer{i}": torch.tensor(load) for i, load in enumerate(layers)})
        sizes_L = torch.tensor([len(load) for load in layers])
        assert max_violation(counts_LE, sizes_L).tolist() == [violation_reference(load) for load in layers]
        assert load_entropy(counts_LE, sizes_L).tolist() == pytest.approx(
            [entropy_reference(load) for load in layers]
        )
        assert dead_experts(counts_LE, sizes_L).tolist() == [load.count(0) for load in layers]

    def test_stack_is_a_copy(self):
        live = torch.tensor([1, 2])
        stacked = stack_layers([live])
        live.zero_()
        assert stacked.tolist() == [[1, 2]]
