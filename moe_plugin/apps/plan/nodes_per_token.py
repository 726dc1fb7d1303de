"""How many nodes the experts of a token are on.

Shape legend: T tokens, E experts, K experts selected per token, N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_plugin.errors import ConfigError
from moe_plugin.routing.selection import limit_to_groups, select_top_k

_TOKENS = 1 << 14


@dataclass(frozen=True)
class Selection:
    """How routers choose.

    Attributes:
        num_experts: Experts of a layer.
        top_k: Experts per token.
        num_groups: Groups of consecutive experts; 1 for no group limit.
        top_k_groups: Groups that a token's experts may come from.
    """

    num_experts: int
    top_k: int
    num_groups: int = 1
    top_k_groups: int = 1

    def without_limit(self) -> Selection:
        """Return the same without groups."""
        return Selection(self.num_experts, self.top_k)

    def expected_nodes(self, nodes: int) -> float:
        """Return the mean number of nodes that hold an expert of a token, if scores are alike and independent.

        Found by routing 16,384 random tokens, always the same (DeepSeek-V3's rule for groups: the sum of their two best
        scores). A node holds neighbouring experts.

        Args:
            nodes: Nodes that the experts are spread over.

        Raises:
            ConfigError: Experts cannot be spread evenly over so many nodes.
        """
        if self.num_experts % nodes:
            raise ConfigError(
                "expert_parallel", f"must spread {self.num_experts} experts evenly over its nodes ({nodes})"
            )
        scores_TE = torch.rand(_TOKENS, self.num_experts, generator=torch.Generator().manual_seed(0))
        if self.num_groups > 1:
            scores_TE = limit_to_groups(scores_TE, self.num_groups, self.top_k_groups)
        nodes_TK = select_top_k(scores_TE, self.top_k) // (self.num_experts // nodes)
        return torch.zeros(_TOKENS, nodes).scatter_(1, nodes_TK, 1.0).sum(1).mean().item()
