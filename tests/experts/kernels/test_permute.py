from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_plugin.experts.kernels.permute import permute, unpermute
from tests.experts.kernels.cases import DTYPES, SEEDS, WIDTHS, Pairs, pairs


class TestPermute:
    @settings(max_examples=40, deadline=None)
    @given(pairs=pairs(), dim=WIDTHS, seed=SEEDS)
    def test_any_pairs_give_the_row_of_their_token(self, pairs: Pairs, dim: int, seed: int) -> None:
        torch.manual_seed(seed)
        x_TD = torch.randn(pairs.num_tokens, dim)
        rows = [x_TD[pair // pairs.top_k] for pair in pairs.pair_ids_P.tolist()]
        expected_PD = torch.stack(rows) if rows else x_TD[:0]
        assert torch.equal(permute(x_TD, pairs.token_ids_P), expected_PD)


class TestUnpermute:
    @settings(max_examples=40, deadline=None)
    @given(pairs=pairs(), dim=WIDTHS, dtype=DTYPES, weighted=st.booleans(), seed=SEEDS)
    def test_any_pairs_sum_the_rows_of_each_token(
        self, pairs: Pairs, dim: int, dtype: torch.dtype, weighted: bool, seed: int
    ) -> None:
        torch.manual_seed(seed)
        y_PD = torch.randn(len(pairs.pair_ids_P), dim).to(dtype)
        weights_TK = torch.rand(pairs.num_tokens, pairs.top_k).to(dtype)
        expected_TD = torch.zeros(pairs.num_tokens, dim, dtype=torch.float64)
        for y_D, pair in zip(y_PD.double(), pairs.pair_ids_P.tolist(), strict=True):
            weight = weights_TK.flatten()[pair].double() if weighted else 1.0
            expected_TD[pair // pairs.top_k] += weight * y_D
        y_TD = unpermute(y_PD, *pairs, *([weights_TK] if weighted else []))
        assert y_TD.dtype == dtype
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(y_TD.double(), expected_TD, atol=4 * tolerance, rtol=tolerance)

    @pytest.mark.parametrize("used", [6, 4, 0])
    def test_each_is_the_gradient_of_the_other(self, used: int) -> None:
        pair_ids_P = torch.tensor([5, 0, 3, 2, 1, 4])[:used]
        x_TD, dy_PD = torch.randn(3, 5), torch.randn(used, 5)
        given = x_TD.clone().requires_grad_()
        permute(given, pair_ids_P // 2).backward(dy_PD)
        torch.testing.assert_close(unpermute(dy_PD, pair_ids_P, 3, 2), given.grad)
        rows = dy_PD.clone().requires_grad_()
        gradient_PD = permute(x_TD, pair_ids_P // 2)
        if used:
            unpermute(rows, pair_ids_P, 3, 2).backward(x_TD)
            torch.testing.assert_close(gradient_PD, rows.grad)
        assert gradient_PD.shape == rows.shape
