"""Causal self-attention with rotary position embeddings (arXiv 2104.09864).

Shape legend: B batch, S sequence, D model width, N heads, A head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_plugin.apps.models.causal import attend
from moe_plugin.errors import ConfigError
from moe_plugin.experts import Linear
from moe_plugin.experts.kernels.dtypes import product_dtype
from moe_plugin.number_checks import check_positive_integers

Rotary = tuple[Tensor, Tensor]


def rotary_table(length: int, head_dim: int, device: torch.device, base: float = 10000.0) -> Rotary:
    """Return cosines and sines of the rotation angles, each (S, A), fp32; the first half of a head turns backwards.

    They are computed in each forward: a buffer could be lost in a cast, in a checkpoint or on the meta device.

    Args:
        length: Positions S.
        head_dim: Head width A.
        device: Where the tables are made.
        base: Pair i turns by `base ** (-2 i / A)` per position.
    """
    frequencies = base ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
    angles_SA = torch.cat((-angles, angles), dim=-1)
    return angles_SA.cos(), angles_SA.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn each pair (i, i + A/2) of a head by the angle of its position, see `rotary_table`: (..., S, A)."""
    cos_SA, sin_SA = (table.to(x.dtype) for table in rotary)
    return torch.addcmul(x * cos_SA, x.roll(x.shape[-1] // 2, -1), sin_SA)


class CausalSelfAttention(nn.Module):
    """Multi-head attention over the past."""

    def __init__(self, dim: int, num_heads: int, *, residual_gain: float = 1.0) -> None:
        """Create the projections.

        Args:
            dim: Width of input and output.
            num_heads: Attention heads; `dim / num_heads` must be an even integer.
            residual_gain: Initial gain of the output projection, which writes to the residual stream.

        Raises:
            ConfigError: The head width is not an even integer.
        """
        super().__init__()
        check_positive_integers(num_heads=num_heads)
        if dim % (2 * num_heads):
            raise ConfigError("num_heads", f"must divide dim ({dim}) into even head widths", num_heads)
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.out = Linear(dim, dim, gain=residual_gain)

    def forward(self, x_BSD: Tensor, rotary: Rotary) -> Tensor:
        """Map (B, S, D) to (B, S, D)."""
        qkv = self.qkv(x_BSD)
        parts = qkv.to(product_dtype(qkv.dtype, qkv.device)).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        q_BNSA, k_BNSA, v_BNSA = (part.transpose(1, 2) for part in parts)
        with torch.autocast(qkv.device.type, enabled=False):
            y_BNSA = attend(rotate(q_BNSA, rotary), rotate(k_BNSA, rotary), v_BNSA)
        return self.out(y_BNSA.transpose(1, 2).flatten(2).to(qkv.dtype))
