"""What ranks send one another in a training step, and over which links."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_plugin.apps.plan.cluster import Group, Hardware

Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]


@dataclass(frozen=True)
class Transfer:
    """One kind of collective in a step.

    Attributes:
        name: What it is for.
        operation: The collective.
        group: The ranks that take part.
        calls: How often.
        size: Bytes of all calls together: what an all-gather returns, and what the others are given.
    """

    name: str
    operation: Operation
    group: Group
    calls: int
    size: int

    @property
    def sent(self) -> float:
        """Bytes that a rank sends, by a ring, or by an all-to-all with equal parts for all ranks."""
        rounds = 2 if self.operation == "all_reduce" else 1
        return rounds * self.size * (self.group.size - 1) / self.group.size

    @property
    def inter_node(self) -> float:
        """Bytes that a rank sends to other nodes; rings cross from node to node at each device in turn."""
        if self.group.nodes == 1:
            return 0.0
        if self.operation == "all_to_all":
            return self.size * (self.group.nodes - 1) / self.group.nodes
        return self.sent / self.group.per_node

    @property
    def intra_node(self) -> float:
        """Bytes that a rank sends within its node."""
        return self.sent - self.inter_node

    def seconds(self, hardware: Hardware) -> float:
        """Return the least time that the links need, both kinds at once."""
        return max(
            self.intra_node / hardware.intra_node_gb_s / 1e9, self.inter_node / hardware.inter_node_gb_s / 1e9
        )
