from __future__ import annotations

import pytest
import torch

from moe_plugin.errors import ConfigError
from moe_plugin.metrics import DeadExperts, LoadEntropy, MaxViolationBatch, MaxViolationGlobal, load_entropy

BATCHES_NLE = torch.tensor([[[4, 0, 0], [1, 1, 0]], [[0, 4, 4], [2, 0, 0]]])
SIZES = [3, 2]


class TestMaxViolationGlobal:
    def test_batches_are_summed_before_the_violation_is_taken(self):
        metric = MaxViolationGlobal(SIZES)
        for counts_LE in BATCHES_NLE:
            metric.update(counts_LE)
        assert metric.per_layer().tolist() == [0.0, 0.5]
        assert metric.compute().item() == 0.25

    def test_several_batches_at_once_equal_one_by_one(self):
        metric = MaxViolationGlobal(SIZES)
        metric.update(BATCHES_NLE)
        assert metric.per_layer().tolist() == [0.0, 0.5]

    def test_counts_beyond_fp32_are_summed_exactly(self):
        metric = MaxViolationGlobal([2])
        for _ in range(3):
            metric.update(torch.tensor([[2**53, 2**53 - 1]]))
        assert metric.tokens_per_expert_LE.tolist() == [[3 * 2**53, 3 * 2**53 - 3]]
        assert metric.half().tokens_per_expert_LE.dtype == torch.int64

    def test_mapping_with_layers_of_different_size_is_accepted(self):
        metric = MaxViolationGlobal(SIZES)
        metric.update({"a": torch.tensor([3, 0, 0]), "b": torch.tensor([0, 1])})
        assert metric.per_layer().tolist() == [2.0, 1.0]


class TestMaxViolationBatch:
    def test_violation_is_averaged_over_batches(self):
        metric = MaxViolationBatch(SIZES)
        metric.update(BATCHES_NLE)
        assert metric.per_layer().tolist() == [(2.0 + 0.5) / 2, (0.0 + 1.0) / 2]

    def test_batch_without_tokens_does_not_count(self):
        metric = MaxViolationBatch([2])
        metric.update(torch.tensor([[[4, 0]], [[0, 0]]]))
        assert metric.compute().item() == 1.0

    def test_no_batches_is_zero(self):
        metric = MaxViolationBatch([2])
        metric.update(torch.zeros(1, 2, dtype=torch.int64))
        assert metric.compute().item() == 0.0


class TestLoadEntropy:
    def test_equals_the_function_of_the_sum(self):
        metric = LoadEntropy(SIZES)
        metric.update(BATCHES_NLE)
        assert torch.equal(metric.per_layer(), load_entropy(BATCHES_NLE.sum(0), torch.tensor(SIZES)))


class TestDeadExperts:
    def test_layers_are_summed(self):
        metric = DeadExperts(SIZES)
        metric.update(BATCHES_NLE[0])
        assert metric.per_layer().tolist() == [2, 0]
        assert metric.compute().item() == 2


class TestBadInput:
    def test_wrong_shape_names_the_shapes(self):
        with pytest.raises(ConfigError, match=r"'tokens_per_expert' must .* = \(2, 3\), got \(3, 3\)"):
            MaxViolationGlobal(SIZES).update(torch.zeros(3, 3, dtype=torch.int64))

    def test_layer_without_experts_is_refused(self):
        with pytest.raises(ConfigError, match=r"'num_experts' must hold at least 1 expert .* \[4, 0\]"):
            DeadExperts([4, 0])


def measure_on_rank(rank, results):
    batch, total, dead = MaxViolationBatch(SIZES), MaxViolationGlobal(SIZES), DeadExperts(SIZES)
    for metric in (batch, total, dead):
        metric.update(BATCHES_NLE[rank])
    computed = (
        total.compute().item(),
        total.per_layer().tolist(),
        batch.compute().item(),
        dead.compute().item(),
    )
    total.update(BATCHES_NLE[rank])
    results[rank] = computed, total.tokens_per_expert_LE.tolist()


class TestTwoRanks:
    def test_ranks_agree_with_one_process_that_saw_it_all(self, on_ranks):
        results = on_ranks(2, measure_on_rank)
        for rank, (computed, own_LE) in results.items():
            assert computed == (0.25, [0.0, 0.5], 0.875, 0)
            assert own_LE == (2 * BATCHES_NLE[rank]).tolist()
