from __future__ import annotations

import torch

from moe_plugin.callbacks.monitor.validation_counts import ValidationCounts
from moe_plugin.metrics.window import PENDING_BATCHES

CPU = torch.device("cpu")


class FakeSite:
    def __init__(self, num_routed):
        self.num_routed = num_routed
        self.eval_counts = torch.full((num_routed,), 99)
        self.eval_tokens = torch.tensor(99)

    def forget_eval_(self):
        self.eval_counts.zero_()
        self.eval_tokens.zero_()


class FakeBalanced(dict):
    """Two sites of different size."""

    process_group = None

    def __init__(self):
        sizes = {"a": 3, "b": 2}
        super().__init__({name: FakeSite(size) for name, size in sizes.items()})

    def count_(self, factor: int) -> None:
        self["a"].eval_counts += factor * torch.tensor([1, 2, 3])
        self["b"].eval_counts += factor * torch.tensor([4, 5])
        self["a"].eval_tokens += 4 * factor
        self["b"].eval_tokens += 3 * factor


class TestValidationCounts:
    def test_batches_are_kept_apart_and_earlier_counts_forgotten(self):
        balanced = FakeBalanced()
        counts = ValidationCounts(balanced)
        for batch in range(PENDING_BATCHES + 2):
            balanced.count_(batch)
            counts.take_()
        load = counts.reduced(CPU)
        tokens_NLE = load.tokens_per_expert_NLE
        assert tokens_NLE.shape == (PENDING_BATCHES + 2, 2, 3)
        assert tokens_NLE[2].tolist() == [[2, 4, 6], [8, 10, 0]]
        assert not balanced["a"].eval_counts.any()
        assert load.tokens_NL[2].tolist() == [8, 6]
        assert load.experts_per_token() == (6 / 4 + 9 / 3) / 2

    def test_no_batches_is_an_empty_rectangle(self):
        assert ValidationCounts(FakeBalanced()).reduced(CPU).tokens_per_expert_NLE.shape == (0, 2, 3)


def count_on_rank(rank, results):
    balanced = FakeBalanced()
    counts = ValidationCounts(balanced)
    for _ in range(1 + 2 * rank):
        balanced.count_(rank + 1)
        counts.take_()
    results[rank] = counts.reduced(CPU).tokens_per_expert_NLE[:, 0, 0].tolist()


class TestTwoRanks:
    def test_ranks_with_different_numbers_of_batches_get_the_global_load(self, on_ranks):
        assert on_ranks(2, count_on_rank) == {0: [3, 2, 2], 1: [3, 2, 2]}
