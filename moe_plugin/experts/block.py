"""The mixture-of-experts block that replaces a feed-forward network.

Shape legend: T tokens, D model width.
"""

from __future__ import annotations

from torch import Tensor, nn

from moe_plugin.experts.grouped import GroupedExperts


class MoEBlock(nn.Module):
    """Routed experts, an optional shared network that every token passes through, and experts without cost."""

    def __init__(
        self,
        router: nn.Module,
        experts: GroupedExperts,
        shared: nn.Module | None = None,
        zero_experts: nn.Module | None = None,
    ) -> None:
        """Compose the block.

        Args:
            router: Maps x_TD to a `Routing`, usually a `moe_plugin.routing.Router`.
            experts: Maps x_TD and the `Routing` to (T, D).
            shared: Maps x_TD to (T, D), added without a gate: arXiv 2401.06066, equation 9.
            zero_experts: Maps x_TD and the `Routing` to (T, D), the output of experts without computation.
        """
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared = shared
        self.zero_experts = zero_experts

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., D)` to `(..., D)`; tokens are all leading dimensions flattened."""
        x_TD = x.flatten(0, -2)
        routing = self.router(x_TD)
        y_TD = self.experts(x_TD, routing)
        if self.zero_experts is not None:
            y_TD = y_TD + self.zero_experts(x_TD, routing)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.view(x.shape)
