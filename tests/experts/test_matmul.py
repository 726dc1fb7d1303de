from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_plugin.experts.matmul import expert_matmul


def reference(rows_PI: torch.Tensor, weights_EIO: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    experts = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return torch.einsum("pi,pio->po", rows_PI, weights_EIO[experts])


def offsets(sizes: list[int]) -> torch.Tensor:
    return torch.tensor(sizes).cumsum(0).int()


class TestExpertMatmul:
    @settings(max_examples=30, deadline=None)
    @given(
        sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6),
        widths=st.tuples(st.sampled_from([3, 8, 16]), st.sampled_from([5, 8, 16])),
    )
    def test_any_sizes_match_reference_with_gradients(self, sizes, widths):
        # 8 and 16 are aligned and go through grouped_mm, 3 and 5 are not and take the loop.
        rows = torch.randn(sum(sizes), widths[0], requires_grad=True)
        weights = torch.randn(len(sizes), *widths, requires_grad=True)
        rows64, weights64 = (t.detach().double().requires_grad_() for t in (rows, weights))
        expected = reference(rows64, weights64, sizes)
        actual = expert_matmul(rows, weights, offsets(sizes))
        gradient = torch.randn_like(actual)
        actual.backward(gradient)
        expected.backward(gradient.double())
        torch.testing.assert_close(actual.double(), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(rows.grad.double(), rows64.grad, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(weights.grad.double(), weights64.grad, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("width", [8, 5])
    def test_expert_without_rows_has_zero_gradient(self, width):
        weights = torch.randn(3, 8, width, requires_grad=True)
        expert_matmul(torch.randn(4, 8), weights, offsets([4, 0, 0])).sum().backward()
        assert weights.grad[0].abs().sum() > 0
        assert torch.equal(weights.grad[1:], torch.zeros(2, 8, width))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_close_to_fp32(self, dtype):
        rows, weights = torch.randn(6, 16).to(dtype), torch.randn(2, 16, 8).to(dtype)
        actual = expert_matmul(rows, weights, offsets([2, 4]))
        assert actual.dtype == dtype
        expected = reference(rows.float(), weights.float(), [2, 4])
        torch.testing.assert_close(actual.float(), expected, atol=0.1, rtol=0.05)

    def test_fp64_passes_gradcheck(self):
        rows = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        weights = torch.randn(3, 3, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda r, w: expert_matmul(r, w, offsets([2, 0, 3])), (rows, weights))

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
    def test_compiled_caller_has_the_same_gradient(self):
        weights, sizes = torch.randn(2, 8, 8, requires_grad=True), offsets([1, 3])

        def loss(rows):
            return expert_matmul(rows * 2, weights, sizes).square().sum()

        rows = torch.randn(4, 8)
        (expected,) = torch.autograd.grad(loss(rows), weights)
        (actual,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(rows), weights)
        torch.testing.assert_close(actual, expected)
