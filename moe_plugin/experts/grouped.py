"""Routed SwiGLU experts with stacked weights: dropless.

Shape legend: T tokens, D model width, H hidden width, E experts, K experts selected per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_plugin.experts.fused import fused_experts
from moe_plugin.experts.kernels.choice import check_choice
from moe_plugin.experts.kernels.dtypes import compute_dtype
from moe_plugin.number_checks import check_positive_integers
from moe_plugin.types import Routing


class GroupedExperts(nn.Module):
    """`num_experts` SwiGLU networks; each token is the gate-weighted sum of the experts it is routed to.

    Attributes:
        gate_up: Gate and up projections, gate first, (E, D, 2H).
        down: Down projections, (E, H, D).
    """

    def __init__(self, num_experts: int, dim: int, hidden_dim: int, *, residual_gain: float = 1.0) -> None:
        """Create the experts.

        Args:
            num_experts: Experts.
            dim: Width of input and output.
            hidden_dim: Hidden width of each expert.
            residual_gain: Initial gain of the down projections, which write to the residual stream.

        Raises:
            ConfigError: A size is not positive, or the chosen kernels cannot run.
        """
        super().__init__()
        check_positive_integers(num_experts=num_experts, dim=dim, hidden_dim=hidden_dim)
        check_choice()
        self.num_experts = num_experts
        self.residual_gain = residual_gain
        self.gate_up = nn.Parameter(torch.empty(num_experts, dim, 2 * hidden_dim))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights of variance gain**2 / input width."""
        nn.init.normal_(self.gate_up, std=self.gate_up.shape[1] ** -0.5)
        nn.init.normal_(self.down, std=self.residual_gain * self.down.shape[1] ** -0.5)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Apply the selected experts to each token.

        Args:
            x_TD: Hidden states.
            routing: Gate weights (T, K), expert ids (T, K), and which of them are used.

        Returns:
            (T, D) in the dtype of `x_TD`, or of the autocast if one is active.
        """
        return fused_experts(x_TD.to(compute_dtype(x_TD)), routing, self.gate_up, self.down)

    def extra_repr(self) -> str:
        """Return sizes, for `print(model)`."""
        num_experts, hidden_dim, dim = self.down.shape
        return f"num_experts={num_experts}, dim={dim}, hidden_dim={hidden_dim}"
