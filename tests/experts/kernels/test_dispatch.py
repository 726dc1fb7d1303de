from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_plugin.experts.kernels.dispatch import combine, plan_dispatch


class TestPlanDispatch:
    @settings(max_examples=40, deadline=None)
    @given(
        seed=st.integers(0, 2**31),
        num_tokens=st.integers(0, 12),
        top_k=st.integers(1, 3),
        num_experts=st.integers(3, 9),
    )
    def test_any_ids_match_a_stable_python_sort(self, seed, num_tokens, top_k, num_experts):
        ids_TK = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed)).topk(
            top_k
        )[1]
        flat = ids_TK.flatten().tolist()
        order = sorted(range(len(flat)), key=lambda pair: flat[pair])
        dispatch = plan_dispatch(ids_TK, num_experts)
        assert dispatch.token_ids_P.tolist() == [pair // top_k for pair in order]
        assert dispatch.rows_P.tolist() == [order.index(pair) for pair in range(len(flat))]
        assert dispatch.offsets_E.tolist() == [sum(i <= e for i in flat) for e in range(num_experts)]
        assert dispatch.offsets_E.dtype == torch.int32

    @settings(max_examples=60, deadline=None)
    @given(data=st.data(), num_tokens=st.integers(0, 8), top_k=st.integers(1, 3))
    def test_unused_pairs_are_left_out(self, data, num_tokens, top_k):
        pairs = num_tokens * top_k
        flat = data.draw(st.lists(st.integers(0, 4), min_size=pairs, max_size=pairs))
        used = data.draw(st.lists(st.booleans(), min_size=pairs, max_size=pairs))
        ids_TK = torch.tensor(flat, dtype=torch.int64).view(num_tokens, top_k)
        used_TK = torch.tensor(used, dtype=torch.bool).view(num_tokens, top_k)
        kept = [pair for pair in range(pairs) if used[pair]]
        order = sorted(kept, key=lambda pair: flat[pair])
        dispatch = plan_dispatch(ids_TK, 5, used_TK)
        assert dispatch.token_ids_P.tolist() == [pair // top_k for pair in order]
        assert dispatch.rows_P.tolist() == [order.index(pair) for pair in kept]
        assert dispatch.offsets_E.tolist() == [sum(flat[p] <= e for p in kept) for e in range(5)]
        assert dispatch.starts_T.tolist() == [sum(p < t * top_k for p in kept) for t in range(num_tokens)]


class TestCombine:
    def test_rows_of_each_token_are_summed(self):
        dispatch = plan_dispatch(torch.tensor([[2, 0], [1, 2]]), 3)
        y_PD = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
        weights_TK = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)
        expected_TD = torch.einsum("tk,tkd->td", weights_TK, y_PD[dispatch.rows_P.view(2, 2)])
        torch.testing.assert_close(combine(y_PD, weights_TK, dispatch), expected_TD)
        assert torch.autograd.gradcheck(lambda y, w: combine(y, w, dispatch), (y_PD, weights_TK))

    def test_tokens_with_fewer_and_no_experts_are_summed(self):
        used_TK = torch.tensor([[True, False], [False, False], [True, True]])
        dispatch = plan_dispatch(torch.tensor([[2, 0], [1, 2], [0, 1]]), 3, used_TK)
        y_PD = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        weights_TK = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
        w, y_TD = weights_TK, combine(y_PD, weights_TK, dispatch)
        expected = [w[0, 0] * y_PD[2], 0 * y_PD[0], w[2, 0] * y_PD[0] + w[2, 1] * y_PD[1]]
        torch.testing.assert_close(y_TD, torch.stack(expected))
        assert torch.autograd.gradcheck(lambda y, w: combine(y, w, dispatch), (y_PD, weights_TK))
