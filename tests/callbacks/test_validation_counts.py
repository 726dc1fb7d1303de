from __future__ import annotations

from types import SimpleNamespace

import torch

from moe_plugin.callbacks.validation_counts import ValidationCounts
from moe_plugin.metrics.window import PENDING_BATCHES

CPU = torch.device("cpu")


class FakeBalanced(dict):
    """Two sites of different size."""

    process_group = None

    def __init__(self):
        sizes = {"a": 3, "b": 2}
        super().__init__(
            {
                name: SimpleNamespace(num_experts=size, eval_counts=torch.full((size,), 99))
                for name, size in sizes.items()
            }
        )

    def count_(self, factor: int) -> None:
        self["a"].eval_counts += factor * torch.tensor([1, 2, 3])
        self["b"].eval_counts += factor * torch.tensor([4, 5])


class TestValidationCounts:
    def test_batches_are_kept_apart_and_earlier_counts_forgotten(self):
        balanced = FakeBalanced()
        counts = ValidationCounts(balanced)
        for batch in range(PENDING_BATCHES + 2):
            balanced.count_(batch)
            counts.take_()
        tokens_NLE = counts.reduced(CPU)
        assert tokens_NLE.shape == (PENDING_BATCHES + 2, 2, 3)
        assert tokens_NLE[2].tolist() == [[2, 4, 6], [8, 10, 0]]
        assert not balanced["a"].eval_counts.any()

    def test_no_batches_is_an_empty_rectangle(self):
        assert ValidationCounts(FakeBalanced()).reduced(CPU).shape == (0, 2, 3)


def count_on_rank(rank, results):
    balanced = FakeBalanced()
    counts = ValidationCounts(balanced)
    for _ in range(1 + 2 * rank):
        balanced.count_(rank + 1)
        counts.take_()
    results[rank] = counts.reduced(CPU)[:, 0, 0].tolist()


class TestTwoRanks:
    def test_ranks_with_different_numbers_of_batches_get_the_global_load(self, on_ranks):
        assert on_ranks(2, count_on_rank) == {0: [3, 2, 2], 1: [3, 2, 2]}
