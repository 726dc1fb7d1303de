from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_plugin.balancing.gaps import LARGEST, SMALLEST, count_gaps_, gap_edges, gaps_of, new_gaps

EDGES = gap_edges(torch.device("cpu")).tolist()


def slow_gaps(scores, top_k, valid=None):
    histogram = [[0] * (len(EDGES) + 1) for _ in scores[0]]
    for token, row in enumerate(scores):
        threshold = sorted(row, reverse=True)[top_k]
        for expert, score in enumerate(row):
            gap = torch.tensor(score) - torch.tensor(threshold)
            if gap.isfinite() and (valid is None or valid[token]):
                histogram[expert][sum(edge < gap for edge in EDGES)] += 1
    return histogram


class GapLayer(nn.Module):
    """A layer that counts gaps as a router does."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.gaps_EG = new_gaps(4)

    def forward(self, x_TD):
        scores_TE = self.linear(x_TD)
        count_gaps_(self.gaps_EG, gaps_of(scores_TE.detach(), 2))
        return scores_TE.relu()


class TestEdges:
    def test_bins_are_symmetric_and_cover_twenty_octaves(self):
        assert sorted(-edge for edge in EDGES) == EDGES
        assert 0.0 in EDGES
        assert (EDGES[-1], min(edge for edge in EDGES if edge > 0)) == (LARGEST, SMALLEST)


class TestCount:
    @settings(max_examples=200, deadline=None)
    @given(
        st.integers(1, 6), st.integers(2, 5), st.integers(0, 10**6), st.sampled_from([1e-5, 0.1, 1.0, 50.0])
    )
    def test_counts_equal_plain_python(self, tokens, experts, seed, scale):
        generator = torch.Generator().manual_seed(seed)
        scores_TE = scale * torch.randn(tokens, experts, generator=generator)
        scores_TE[torch.rand(tokens, experts, generator=generator) < 0.1] = -torch.inf
        valid_T = torch.rand(tokens, generator=generator) < 0.7
        gaps_EG = new_gaps(experts)
        count_gaps_(gaps_EG, gaps_of(scores_TE, 1), valid_T)
        assert gaps_EG.tolist() == slow_gaps(scores_TE.tolist(), 1, valid_T.tolist())

    def test_gaps_above_zero_are_the_selected(self):
        scores_TE, gaps_EG = torch.randn(100, 8), new_gaps(8)
        count_gaps_(gaps_EG, gaps_of(scores_TE, 3))
        counts_E = torch.bincount(scores_TE.topk(3).indices.flatten(), minlength=8)
        assert torch.equal(gaps_EG[:, EDGES.index(0.0) + 1 :].sum(-1), counts_E)


class TestOncePerForward:
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_recomputation_does_not_count(self, reentrant):
        layer = GapLayer()
        checkpoint(layer, torch.randn(6, 4, requires_grad=True), use_reentrant=reentrant).sum().backward()
        assert layer.gaps_EG.sum() == 6 * 4

    def test_no_grad_does_not_count(self):
        layer = GapLayer()
        with torch.no_grad():
            layer(torch.randn(6, 4))
        assert layer.gaps_EG.sum() == 0

    def test_compiled_forward_counts(self):
        layer = GapLayer()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        compiled(torch.randn(6, 4)).sum().backward()
        assert layer.gaps_EG.sum() == 6 * 4
