"""A router that also offers experts without computation: a token that picks them spends less.

Shape legend: T tokens, D model width, E experts, K experts selected per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_plugin.errors import ConfigError
from moe_plugin.routing.router import Router
from moe_plugin.routing.scores import Score
from moe_plugin.types import Allocation, Routing


@dataclass(frozen=True)
class ZeroExpertCounts:
    """How many experts of each kind stand beside the routed ones: arXiv 2410.07348, section 3.1.

    Attributes:
        identity: Experts that return their input (arXiv 2509.01322 has only these).
        zero: Experts that return nothing.
        constant: Experts that mix their input with a learnt vector.
    """

    identity: int = 0
    zero: int = 0
    constant: int = 0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: One is negative, or there are no experts at all.
        """
        for name, value in vars(self).items():
            if value < 0:
                raise ConfigError(f"'{name}' must be >= 0, got {value}.")
        if self.total == 0:
            raise ConfigError("'zero_experts' must have an expert of some kind, got none.")

    @property
    def total(self) -> int:
        """Experts of all kinds."""
        return self.identity + self.zero + self.constant


class ZeroExpertRouter(Router):
    """Sends each token to `max_k` experts, of which `target_k` in the mean compute something.

    The first `num_routed` of its experts are routed ones, the others cost nothing. The selection bias holds both the
    balance among the routed ones and the share of the others: see `allocation`.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        score: Score,
        max_k: int,
        zero_experts: ZeroExpertCounts,
        target_k: float | None = None,
        normalize: bool = False,
        scale: float = 1.0,
    ) -> None:
        """Create the router.

        Args:
            dim: Width of the hidden states.
            num_experts: Routed experts, those that compute.
            top_k: Routed experts per token in the mean, unless `target_k` says otherwise.
            score: Score function, see `moe_plugin.routing.scores`.
            max_k: Experts per token of both kinds together.
            zero_experts: Experts that cost nothing.
            target_k: Routed experts per token in the mean, not necessarily an integer; None is `top_k`.
            normalize: Divide each token's gate weights by their sum over both kinds.
            scale: Factor on the gate weights, applied last.

        Raises:
            ConfigError: The numbers do not fit together.
        """
        target_k = float(top_k if target_k is None else target_k)
        if not 0 < target_k < max_k:
            raise ConfigError(f"'target_k' must be > 0 and < max_k ({max_k}), got {target_k}.")
        total = num_experts + zero_experts.total
        super().__init__(dim, total, max_k, score=score, normalize=normalize, scale=scale)
        self.num_routed = num_experts
        self.target_k = target_k
        self.zero_experts = zero_experts

    def allocation(self) -> Allocation:
        """Return the share of all picks that each expert should get: arXiv 2509.01322, section 2.1.2.

        Routed experts share ``target_k`` of the ``max_k`` picks of a token evenly, the others the rest.
        """
        num_zero = self.num_experts - self.num_routed
        routed = self.target_k / self.top_k
        shares_E = [routed / self.num_routed] * self.num_routed + [(1 - routed) / num_zero] * num_zero
        return Allocation(self.target_k, self.num_routed, shares_E)

    def forward(self, x_TD: Tensor) -> Routing:
        """Route each token; see `Router.forward`. Picks of experts that cost nothing are marked as unused."""
        routing = super().forward(x_TD)
        return routing._replace(used_TK=routing.expert_ids_TK < self.num_routed)
