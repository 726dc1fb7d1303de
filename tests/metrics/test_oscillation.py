from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_plugin.metrics.oscillation import StepCorrelation


class TestStepCorrelation:
    def test_swinging_steady_and_idle_layers(self):
        even, odd = [[6, 2], [6, 2], [0, 0]], [[2, 6], [6, 2], [0, 0]]
        correlation = StepCorrelation([2, 2, 2])
        correlation.add_(torch.tensor([even, odd, even, odd]))
        assert correlation.by_layer().tolist() == pytest.approx([-1, 1, 0])

    def test_chunks_make_no_difference_and_it_equals_numpy(self):
        tokens_NLE = torch.randint(1, 50, (12, 1, 5))
        whole, parts = StepCorrelation([5]), StepCorrelation([5])
        whole.add_(tokens_NLE)
        for chunk in tokens_NLE.split(5):
            parts.add_(chunk)
        tokens_NE = tokens_NLE[:, 0].double().numpy()
        errors_NE = tokens_NE / tokens_NE.mean(-1, keepdims=True) - 1
        before, after = errors_NE[:-1].ravel(), errors_NE[1:].ravel()
        expected = before @ after / np.sqrt(before @ before * (after @ after))
        assert whole.by_layer().item() == pytest.approx(expected)
        assert parts.by_layer().item() == pytest.approx(expected)

    def test_experts_a_layer_lacks_do_not_count(self):
        wide, narrow = StepCorrelation([4, 2]), StepCorrelation([2])
        tokens_NE = torch.tensor([[5, 3], [4, 4], [1, 7]])
        narrow.add_(tokens_NE.unsqueeze(1))
        padded = torch.nn.functional.pad(tokens_NE, (0, 2))
        wide.add_(torch.stack([torch.ones_like(padded), padded], dim=1))
        assert wide.by_layer()[1] == narrow.by_layer()[0]
