"""Histograms of how far every score is from being selected.

Shape legend: T tokens, E experts, G bins.

The gap of a score is its biased value minus the (k+1)-th largest biased score of its token: positive if the expert was
selected. Bins are fixed and symmetric around 0, half an octave wide from `SMALLEST` to `LARGEST`, with everything
outside in the outermost: they suit scores of any scale and sum exactly over ranks and micro-batches.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from moe_plugin.balancing.recompute import is_training_forward

SMALLEST, LARGEST = 2.0**-16, 2.0**4
_PER_OCTAVE = 2
_OCTAVES = 20

_LIBRARY = torch.library.Library("moe_plugin", "FRAGMENT")
_LIBRARY.define("count_gaps_(Tensor(a!) gaps_EG, Tensor gap_TE, Tensor? valid_T, bool grad_enabled) -> ()")


@cache
def gap_edges(device: torch.device) -> Tensor:
    """Return the edges between bins, rising, 0 among them; fp32 (G - 1,)."""
    steps = torch.arange(_OCTAVES * _PER_OCTAVE + 1, dtype=torch.float64)
    sizes = (SMALLEST * 2 ** (steps / _PER_OCTAVE)).float()
    return torch.cat([-sizes.flip(0), torch.zeros(1, dtype=torch.float32), sizes]).to(device)


def new_gaps(num_experts: int) -> Tensor:
    """Return an empty histogram for each expert; int64 zeros (E, G)."""
    return torch.zeros(num_experts, gap_edges(torch.device("cpu")).numel() + 1, dtype=torch.int64)


def gaps_of(biased_TE: Tensor, top_k: int) -> Tensor:
    """Return the gap of each score, see above; fp32 (T, E).

    Args:
        biased_TE: Scores plus bias, not finite if a token may not select an expert; any leading shape.
        top_k: K, fewer than E.
    """
    biased_TE = biased_TE.reshape(-1, biased_TE.shape[-1]).float()
    return biased_TE - biased_TE.topk(top_k + 1).values[:, -1:]


def count_gaps_(gaps_EG: Tensor, gap_TE: Tensor, valid_T: Tensor | None = None) -> None:
    """Add one training forward to ``gaps_EG``, in place; nothing in recomputation, under ``no_grad`` or in backward.

    Args:
        gaps_EG: From `new_gaps`, on the device of the scores.
        gap_TE: From `gaps_of`; those that are not finite do not count.
        valid_T: bool, True for tokens that count; or how often each counts, int64. None when all count once.
    """
    run = torch.ops.moe_plugin.count_gaps_ if torch.compiler.is_compiling() else _count_gaps
    run(gaps_EG, gap_TE, valid_T, torch.is_grad_enabled())


def _count_gaps(gaps_EG: Tensor, gap_TE: Tensor, valid_T: Tensor | None, grad_enabled: bool) -> None:
    if not is_training_forward(grad_enabled):
        return
    num_experts, num_bins = gaps_EG.shape
    counted_TE = gap_TE.isfinite().long()
    if valid_T is not None:
        counted_TE *= valid_T.reshape(-1, 1)
    # Comparisons only, no logarithm: a gap falls into the same bin at every place of a tensor.
    bins_TE = torch.bucketize(gap_TE.contiguous(), gap_edges(gap_TE.device))
    bins_TE += num_bins * torch.arange(num_experts, device=bins_TE.device)
    gaps_EG.view(-1).scatter_add_(0, bins_TE.view(-1), counted_TE.view(-1))


def balanced_gap(gaps_EG: Tensor, expected_E: Tensor) -> Tensor:
    """Return the biased gap above which each expert has ``expected_E`` tokens, nearest to 0 if there are several.

    Args:
        gaps_EG: Histogram; int64 (..., E, G).
        expected_E: Tokens per expert; float64 (..., E) or (..., 1).

    Returns:
        float64 (..., E); 0 if the histogram is empty.
    """
    edges = gap_edges(gaps_EG.device).double()
    lower_G, upper_G = torch.cat([edges[:1], edges]), torch.cat([edges, edges[-1:]])
    above_EG = gaps_EG.flip(-1).cumsum(-1).flip(-1)
    all_E1 = above_EG[..., :1]
    share_E1 = torch.minimum(expected_E[..., None], all_E1.double())

    def at(reached_EG: Tensor) -> Tensor:
        bin_E1 = (reached_EG.sum(-1, keepdim=True) - 1).clamp(min=0)
        inside_E1 = gaps_EG.gather(-1, bin_E1)
        part_E1 = (share_E1 - (above_EG.gather(-1, bin_E1) - inside_E1)) / inside_E1.clamp(min=1)
        return torch.lerp(upper_G[bin_E1], lower_G[bin_E1], part_E1.clamp(0, 1))

    most_E1, least_E1 = at(above_EG >= share_E1), at(above_EG > share_E1)
    least_E1 = torch.where(all_E1 > share_E1, least_E1, edges[0])
    nearest_E1 = torch.zeros_like(most_E1).clamp(least_E1, most_E1)
    return torch.where(all_E1 > 0, nearest_E1, 0.0).squeeze(-1)


_LIBRARY.impl("count_gaps_", _count_gaps, "CompositeExplicitAutograd")
torch.library.register_fake("moe_plugin::count_gaps_", lambda *_: None, lib=_LIBRARY)
