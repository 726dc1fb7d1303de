"""Attention in which a position sees only those up to itself.

Shape legend: B batch, N heads, S sequence, A head width, G the heads of all sequences.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moe_plugin.experts.kernels.dtypes import HALVES

LONGEST_IN_BLOCKS = 1024
"""Positions of a sequence above which the weights kept for the backward would take too much memory."""
_BLOCK = 128


def attend(q_BNSA: Tensor, k_BNSA: Tensor, v_BNSA: Tensor) -> Tensor:
    """Return causal attention, as `functional.scaled_dot_product_attention` does: (B, N, S, A).

    In half precision on a CPU, products and a softmax for a block of positions at a time beat torch's fused kernel:
    docs/speed.md.
    """
    # On a CPU that only emulates half precision the heads are in fp32 by now.
    in_half = q_BNSA.device.type == "cpu" and q_BNSA.dtype in HALVES
    if in_half and q_BNSA.shape[-2] <= LONGEST_IN_BLOCKS:
        return _InBlocks.apply(*(each.flatten(0, 1) for each in (q_BNSA, k_BNSA, v_BNSA))).view_as(q_BNSA)
    return functional.scaled_dot_product_attention(q_BNSA, k_BNSA, v_BNSA, is_causal=True)


class _InBlocks(torch.autograd.Function):
    """Attention in blocks of positions. Scores beyond the end of a block are in the future and not computed."""

    @staticmethod
    def forward(ctx: Any, q_GSA: Tensor, k_GSA: Tensor, v_GSA: Tensor) -> Tensor:
        scale = q_GSA.shape[-1] ** -0.5
        outputs, weights = [], []
        for block, seen in _blocks(q_GSA.shape[1]):
            future = q_GSA.new_full((block.stop - block.start, seen.stop), -math.inf).triu(1 + block.start)
            scores = torch.baddbmm(future, q_GSA[:, block], k_GSA[:, seen].mT, alpha=scale)
            weights.append(scores.softmax(-1))
            outputs.append(weights[-1] @ v_GSA[:, seen])
        ctx.save_for_backward(q_GSA, k_GSA, v_GSA, *weights)
        return torch.cat(outputs, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_GSA, k_GSA, v_GSA, *weights = ctx.saved_tensors
        scale = q_GSA.shape[-1] ** -0.5
        dq, dk_GSA, dv_GSA = [], torch.zeros_like(k_GSA), torch.zeros_like(v_GSA)
        for (block, seen), weight in zip(_blocks(q_GSA.shape[1]), weights, strict=True):
            gradient = gradients[0][:, block]
            dv_GSA[:, seen].baddbmm_(weight.mT, gradient)
            dweight = gradient @ v_GSA[:, seen].mT
            dscores = torch.ops.aten._softmax_backward_data(dweight, weight, -1, weight.dtype)
            dq.append(dscores @ k_GSA[:, seen])
            dk_GSA[:, seen].baddbmm_(dscores.mT, q_GSA[:, block], alpha=scale)
        return torch.cat(dq, 1).mul_(scale), dk_GSA, dv_GSA


def _blocks(length: int) -> list[tuple[slice, slice]]:
    """Return the positions of each block, and those that its last one sees."""
    bounds = (*range(0, length, _BLOCK), length)
    return [(slice(begin, end), slice(end)) for begin, end in pairwise(bounds)]
