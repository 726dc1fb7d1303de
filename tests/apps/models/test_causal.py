from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moe_plugin.apps.models import causal
from moe_plugin.apps.models.causal import LONGEST_IN_BLOCKS, attend


def masked_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention to the past, from its definition."""
    future_SS = torch.ones(q.shape[-2], q.shape[-2]).triu(1).bool()
    scores_BNSS = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(future_SS, -math.inf)
    return scores_BNSS.softmax(-1) @ v


class TestAttend:
    @pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
    def test_blocks_match_masked_softmax_with_gradients(self, monkeypatch, length):
        monkeypatch.setattr(causal, "HALVES", {torch.float64})
        inputs = [torch.randn(2, 3, length, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        gradient, found = torch.randn(2, 3, length, 8, dtype=torch.float64), []
        for attention in (attend, masked_softmax):
            y_BNSA = attention(*inputs)
            found.append((y_BNSA, *torch.autograd.grad(y_BNSA, inputs, gradient)))
        torch.testing.assert_close(found[0], found[1])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("length", [33, 300, LONGEST_IN_BLOCKS + 1])
    def test_output_and_gradients_match_fp64(self, dtype, length):
        inputs = [torch.randn(2, 2, length, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
        wide = [each.detach().double().requires_grad_() for each in inputs]
        expected, actual = masked_softmax(*wide), attend(*inputs)
        assert actual.dtype == dtype
        expected.sum().backward()
        actual.sum().backward()
        # In bf16 scores and weights are rounded on the way.
        close = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.06, "rtol": 0.02}
        torch.testing.assert_close(actual.double(), expected, **close)
        for one, other in zip(inputs, wide, strict=True):
            assert one.grad is not None
            torch.testing.assert_close(one.grad.double(), other.grad, **close)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("changed", [5, 130])
    def test_later_positions_change_nothing_before_them(self, dtype, changed):
        q, k, v = (torch.randn(1, 2, 140, 8, dtype=dtype) for _ in range(3))
        before = attend(q, k, v)
        k[:, :, changed:], v[:, :, changed:] = 100.0, 1e6
        assert torch.equal(attend(q, k, v)[:, :, :changed], before[:, :, :changed])

    def test_blocks_keep_no_weights_of_the_future(self):
        inputs = [torch.randn(1, 1, 512, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            attend(*inputs)
        assert sum(kept) == 3 * 512 * 8 + 128 * (128 + 256 + 384 + 512)
