from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch

from moe_plugin.errors import ConfigError
from moe_plugin.experts import dtypes
from moe_plugin.models.attention import (
    LONGEST_BY_PRODUCTS,
    CausalSelfAttention,
    attend,
    rotary_table,
    rotate,
)

CPU = torch.device("cpu")


class TestRotate:
    def test_pairs_match_complex_rotation(self):
        x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
        actual = rotate(x, rotary_table(5, 8, CPU))
        for position in range(5):
            for pair in range(4):
                angle = position * 10000.0 ** (-2 * pair / 8)
                turned = torch.complex(x[..., position, pair], x[..., position, pair + 4]) * complex(
                    math.cos(angle), math.sin(angle)
                )
                torch.testing.assert_close(actual[..., position, pair], turned.real, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(actual[..., position, pair + 4], turned.imag, atol=1e-5, rtol=1e-5)

    def test_scores_depend_on_distance_only(self):
        q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
        table = rotary_table(20, 8, CPU)
        q_S, k_S = (rotate(t.expand(1, 1, 20, 8), table)[0, 0] for t in (q, k))
        scores_SS = q_S @ k_S.T
        torch.testing.assert_close(scores_SS[3, 1], scores_SS[17, 15], atol=1e-4, rtol=1e-4)


class TestAttend:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("length", [1, 33, LONGEST_BY_PRODUCTS, LONGEST_BY_PRODUCTS + 1])
    def test_output_and_gradients_match_masked_softmax_in_fp64(self, dtype, length):
        inputs = [torch.randn(2, 2, length, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
        wide = [each.detach().double().requires_grad_() for each in inputs]
        q, k, v = wide
        scores_BNSS = (q @ k.mT / 8**0.5).masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        expected, actual = scores_BNSS.softmax(-1) @ v, attend(*inputs)
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
    def test_later_positions_change_nothing_before_them(self, dtype):
        q, k, v = (torch.randn(1, 2, 9, 8, dtype=dtype) for _ in range(3))
        before = attend(q, k, v)
        k[:, :, 5:], v[:, :, 5:] = 100.0, 1e6
        assert torch.equal(attend(q, k, v)[:, :, :5], before[:, :, :5])


class TestCausalSelfAttention:
    def test_output_matches_loop_over_positions(self):
        attention, x = CausalSelfAttention(8, 2), torch.randn(1, 5, 8)
        table = rotary_table(5, 4, CPU)
        q, k, v = attention.qkv(x)[0].split(8, dim=-1)
        heads = []
        for head in range(2):
            columns = slice(4 * head, 4 * head + 4)
            q_SA, k_SA = (rotate(t[None, None, :, columns], table)[0, 0] for t in (q, k))
            rows = [
                ((q_SA[s] @ k_SA[: s + 1].T) / 2).softmax(-1) @ v[: s + 1, columns] for s in range(5)
            ]  # 2 is the square root of the head width
            heads.append(torch.stack(rows))
        expected = attention.out(torch.cat(heads, dim=-1))
        torch.testing.assert_close(attention(x, table)[0], expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("emulated", [False, True])
    @pytest.mark.parametrize("autocasts", [False, True])
    def test_bf16_matches_fp32(self, monkeypatch, emulated, autocasts):
        monkeypatch.setattr(dtypes, "EMULATED_BY_CPU", {torch.float16, torch.bfloat16} if emulated else set())
        attention, x, table = CausalSelfAttention(16, 2), torch.randn(2, 7, 16), rotary_table(7, 8, CPU)
        narrow = deepcopy(attention) if autocasts else deepcopy(attention).bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
            y = narrow(x if autocasts else x.bfloat16(), table)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), attention(x, table), atol=0.1, rtol=0.05)
        y.sum().backward()
        attention(x, table).sum().backward()
        for one, other in zip(narrow.parameters(), attention.parameters(), strict=True):
            torch.testing.assert_close(one.grad.float(), other.grad, atol=0.5, rtol=0.05)

    @pytest.mark.parametrize("num_heads", [0, 3, 8])
    def test_odd_head_width_is_refused(self, num_heads):
        with pytest.raises(ConfigError, match=r"'num_heads' must divide dim \(8\)"):
            CausalSelfAttention(8, num_heads)
