from __future__ import annotations

import torch

from moe_plugin.metrics import LoadWindow, MaxViolationBatch, load_entropy
from moe_plugin.metrics.window import PENDING_BATCHES


class TestLoadWindow:
    def test_loads_equal_the_metrics_over_all_batches(self):
        batches_NLE = torch.randint(0, 50, (2 * PENDING_BATCHES + 3, 2, 4))
        batches_NLE[:, 1, 3] = 0
        window = LoadWindow({"a": 4, "b": 3})
        for counts_LE in batches_NLE:
            window.add_({"b": counts_LE[1, :3], "a": counts_LE[0]})
        loads = window.layer_loads()
        batch = MaxViolationBatch([4, 3])
        batch.update(batches_NLE)
        assert window.batches == len(batches_NLE)
        assert list(loads) == ["a", "b"]
        assert loads["b"].tokens_per_expert == tuple(batches_NLE.sum(0)[1, :3].tolist())
        assert loads["b"].dead_experts == 0
        assert loads["b"].entropy == load_entropy(batches_NLE.sum(0)[1, :3]).item()
        torch.testing.assert_close(
            torch.tensor([load.max_violation_batch for load in loads.values()], dtype=torch.float64),
            batch.per_layer(),
        )

    def test_live_counts_may_be_zeroed_after_adding(self):
        window = LoadWindow({"a": 2})
        counts = torch.tensor([3, 1])
        window.add_({"a": counts})
        counts.zero_()
        assert window.layer_loads()["a"].tokens_per_expert == (3, 1)

    def test_reset_starts_a_new_window(self):
        window = LoadWindow({"a": 2})
        window.add_({"a": torch.tensor([3, 1])})
        window.layer_loads()
        window.add_({"a": torch.tensor([3, 1])})
        window.reset_()
        assert window.batches == 0
        assert window.layer_loads()["a"].dead_experts == 2
