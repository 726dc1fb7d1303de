"""The mixture-of-experts block in which experts choose their tokens.

Shape legend: T tokens, D model width, E experts, C tokens per expert, P = E * C pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_plugin.experts.grouped import GroupedExperts
from moe_plugin.routing.expert_choice import ExpertChoiceRouter
from moe_plugin.types import Routing


class ExpertChoiceBlock(nn.Module):
    """A block like `MoEBlock` around an `ExpertChoiceRouter`, which sees later tokens: a baseline only."""

    def __init__(
        self, router: ExpertChoiceRouter, experts: GroupedExperts, shared: nn.Module | None = None
    ) -> None:
        """Compose the block.

        Args:
            router: Chooses the tokens of each expert.
            experts: The experts.
            shared: Maps x_TD to (T, D), added without a gate.
        """
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., D)` to `(..., D)`; tokens are all leading dimensions flattened."""
        x_TD = x.flatten(0, -2)
        ids_EC, weights_EC = self.router(x_TD)
        experts_E1 = torch.arange(len(ids_EC), device=x.device)[:, None]
        weights_P1 = weights_EC.reshape(-1, 1)
        pairs = Routing(weights_P1, experts_E1.expand_as(ids_EC).reshape(-1, 1), weights_P1)
        y_PD = self.experts(x_TD.index_select(0, ids_EC.flatten()), pairs)
        y_TD = y_PD.new_zeros(x_TD.shape).index_add_(0, ids_EC.flatten(), y_PD)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.view(x.shape)
