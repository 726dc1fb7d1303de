"""Causal self-attention with rotary position embeddings (arXiv 2104.09864).

Shape legend: B batch, S sequence, D model width, N heads, A head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_plugin.errors import ConfigError
from moe_plugin.experts import Linear
from moe_plugin.experts.dtypes import HALVES, product_dtype

Rotary = tuple[Tensor, Tensor]
LONGEST_BY_PRODUCTS = 512
"""Positions up to which two products and a softmax beat torch's fused kernel in bf16 on a CPU: docs/speed.md."""


def rotary_table(length: int, head_dim: int, device: torch.device, base: float = 10000.0) -> Rotary:
    """Cosines and sines of the rotation angles, each (S, A), fp32.

    Computed once per forward and not kept as a buffer: there is nothing to lose in a cast, a checkpoint or on
    the meta device.
    """
    frequencies = base ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
    angles_SA = torch.cat((angles, angles), dim=-1)
    return angles_SA.cos(), angles_SA.sin()


def rotate(x_BNSA: Tensor, rotary: Rotary) -> Tensor:
    """Turns each pair (i, i + A/2) of a head by the angle of its position."""
    cos_SA, sin_SA = (table.to(x_BNSA.dtype) for table in rotary)
    first, second = x_BNSA.chunk(2, dim=-1)
    return x_BNSA * cos_SA + torch.cat((-second, first), dim=-1) * sin_SA


def attend(q_BNSA: Tensor, k_BNSA: Tensor, v_BNSA: Tensor) -> Tensor:
    """Each position's mean of the values up to it, weighted by the softmax of the scaled scores: (B, N, S, A)."""
    length, head_dim = q_BNSA.shape[-2:]
    # On a CPU that only emulates half precision the heads are in fp32 by now.
    if q_BNSA.device.type == "cpu" and q_BNSA.dtype in HALVES and length <= LONGEST_BY_PRODUCTS:
        q, k, v = (each.flatten(0, 1) for each in (q_BNSA, k_BNSA, v_BNSA))
        future_SS = q.new_full((length, length), -math.inf).triu(1)
        scores = torch.baddbmm(future_SS, q, k.mT, alpha=head_dim**-0.5)
        return (scores.softmax(-1) @ v).view_as(q_BNSA)
    return functional.scaled_dot_product_attention(q_BNSA, k_BNSA, v_BNSA, is_causal=True)


class CausalSelfAttention(nn.Module):
    """Multi-head attention over the past."""

    def __init__(self, dim: int, num_heads: int, *, residual_gain: float = 1.0) -> None:
        """Creates the projections.

        Args:
            dim: Width of input and output.
            num_heads: Heads; `dim / num_heads` must be an even integer.
            residual_gain: Initial gain of the output projection, which writes to the residual stream.

        Raises:
            ConfigError: The head width is not an even integer.
        """
        super().__init__()
        if num_heads < 1 or dim % (2 * num_heads):
            raise ConfigError(f"'num_heads' must divide dim ({dim}) into even head widths, got {num_heads}.")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.out = Linear(dim, dim, gain=residual_gain)

    def forward(self, x_BSD: Tensor, rotary: Rotary) -> Tensor:
        """Maps (B, S, D) to (B, S, D)."""
        qkv = self.qkv(x_BSD)
        heads = qkv.unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = (each.to(product_dtype(qkv.dtype, qkv.device)) for each in heads)
        with torch.autocast(qkv.device.type, enabled=False):
            y_BNSA = attend(rotate(q, rotary), rotate(k, rotary), v)
        return self.out(y_BNSA.transpose(1, 2).flatten(2).to(qkv.dtype))
