from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_plugin.experts.kernels import permute
from tests.experts.kernels.cases import DEVICES, DTYPES, SEEDS, WIDTHS, Pairs, pairs

pytest.importorskip("triton", reason="needs Triton: pip install 'moe_plugin[triton]'")
from moe_plugin.experts.kernels import permute_triton


@pytest.mark.parametrize("device", DEVICES)
class TestTwins:
    @settings(max_examples=40, deadline=None)
    @given(pairs=pairs(), dim=WIDTHS, dtype=DTYPES, seed=SEEDS)
    def test_permute_gives_the_same_bits(
        self, device: str, pairs: Pairs, dim: int, dtype: torch.dtype, seed: int
    ) -> None:
        torch.manual_seed(seed)
        given = torch.randn(pairs.num_tokens, dim).to(device, dtype), pairs.token_ids_P.to(device)
        assert torch.equal(permute_triton.permute(*given), permute.permute(*given))

    @settings(max_examples=40, deadline=None)
    @given(pairs=pairs(), dim=WIDTHS, dtype=DTYPES, weighted=st.booleans(), seed=SEEDS)
    def test_unpermute_gives_the_same(
        self, device: str, pairs: Pairs, dim: int, dtype: torch.dtype, weighted: bool, seed: int
    ) -> None:
        torch.manual_seed(seed)
        pair_ids_P = pairs.pair_ids_P.to(device)
        y_PD = torch.randn(len(pair_ids_P), dim).to(device, dtype)
        weights_TK = torch.rand(pairs.num_tokens, pairs.top_k).to(device, dtype) if weighted else None
        given = y_PD, pair_ids_P, pairs.num_tokens, pairs.top_k, weights_TK
        one_TD, other_TD = permute_triton.unpermute(*given), permute.unpermute(*given)
        assert one_TD.dtype == dtype
        torch.testing.assert_close(one_TD, other_TD)
        assert torch.equal(one_TD, permute_triton.unpermute(*given))

    def test_views_are_read_as_they_are(self, device: str) -> None:
        x_TD, ids_P = torch.randn(5, 4, device=device).T, torch.tensor([3, 9, 0, 9, 2], device=device)[::2]
        weights_TK = torch.rand(2, 4, device=device).T
        assert torch.equal(permute_triton.permute(x_TD, ids_P), permute.permute(x_TD, ids_P))
        given = x_TD[:3], ids_P, 4, 2, weights_TK
        torch.testing.assert_close(permute_triton.unpermute(*given), permute.unpermute(*given))

    def test_unused_pairs_cost_no_nan(self, device: str) -> None:
        y_PD = torch.full((1, 3), torch.nan, device=device)
        y_TD = permute_triton.unpermute(y_PD, torch.tensor([2], device=device), 2, 2)
        assert y_TD.isnan().tolist() == [[False] * 3, [True] * 3]
