from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch

from moe_plugin.apps.models.attention import CausalSelfAttention, rotary_table, rotate
from moe_plugin.errors import ConfigError
from moe_plugin.experts.kernels import dtypes

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

    @pytest.mark.parametrize("num_heads", [3, 8])
    def test_odd_head_width_is_refused(self, num_heads):
        message = rf"'num_heads' must divide dim \(8\) into even head widths, got {num_heads}\."
        with pytest.raises(ConfigError, match=message):
            CausalSelfAttention(8, num_heads)

    @pytest.mark.parametrize("num_heads", [0, 1.5, True])
    def test_number_of_heads_that_is_no_positive_integer_is_refused(self, num_heads):
        with pytest.raises(ConfigError, match=f"'num_heads' must be an integer >= 1, got {num_heads}"):
            CausalSelfAttention(8, num_heads)
