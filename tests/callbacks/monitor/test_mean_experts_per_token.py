from __future__ import annotations

import torch

from moe_plugin.callbacks.monitor.mean_experts_per_token import MeanExpertsPerToken
from moe_plugin.types import LoadRecord


def record(step: int, counts: dict[str, list[int]], tokens: dict[str, int]) -> LoadRecord:
    tensors = {name: torch.tensor(each) for name, each in counts.items()}
    return LoadRecord(step, tensors, {name: torch.tensor(each) for name, each in tokens.items()}, {})


class TestTake:
    def test_mean_is_selections_over_tokens_since_the_last_call(self):
        mean = MeanExpertsPerToken()
        mean.add_(record(1, {"a": [3, 5], "b": [0, 0]}, {"a": 4, "b": 0}))
        mean.add_(record(2, {"a": [1, 1], "b": [0, 0]}, {"a": 4, "b": 0}))
        assert mean.take() == ({"a": 10 / 8}, 8)
        assert mean.take() == ({}, 0)
        mean.add_(record(3, {"a": [2, 1], "b": [6, 0]}, {"a": 2, "b": 3}))
        assert mean.take() == ({"a": 1.5, "b": 2.0}, 3)
