"""The SwiGLU feed-forward network: dense layers and shared experts (arXiv 2002.05202).

Shape legend: D model width, H hidden width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from moe_plugin.experts.linear import Linear


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`, gate and up in one matrix product."""

    def __init__(self, dim: int, hidden_dim: int, *, residual_gain: float = 1.0) -> None:
        """Create the network.

        Args:
            dim: Width of input and output.
            hidden_dim: Hidden width.
            residual_gain: Initial gain of the down projection, which writes to the residual stream.
        """
        super().__init__()
        self.gate_up = Linear(dim, 2 * hidden_dim)
        self.down = Linear(hidden_dim, dim, gain=residual_gain)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., D)` to `(..., D)`."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * up)
