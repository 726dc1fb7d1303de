"""Devices, their links, and which ranks are on which node."""

from __future__ import annotations

from dataclasses import dataclass

from moe_plugin.errors import ConfigError
from moe_plugin.number_checks import check_not_negative, check_positive, check_positive_integers


@dataclass(frozen=True)
class Hardware:
    """One kind of node, as in `conf/hardware/`.

    Attributes:
        name: What it is called in tables.
        devices_per_node: Devices, one process each.
        memory_gib: Memory of a device, GiB.
        reserved_gib: The part that training does not get: context, communication buffers, fragmentation.
        peak_tflops: Peak of dense products of a device in bf16, 1e12 operations per second.
        intra_node_gb_s: What a device sends to the others of its node, 1e9 bytes per second in one direction.
        inter_node_gb_s: The same to other nodes.
        gather_copies: Copies of its result that the backend holds while it gathers: 0 for NCCL, 1 for gloo.
    """

    name: str
    devices_per_node: int
    memory_gib: float
    reserved_gib: float
    peak_tflops: float
    intra_node_gb_s: float
    inter_node_gb_s: float
    gather_copies: int = 0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: A number is out of range.
        """
        check_positive_integers(devices_per_node=self.devices_per_node)
        for name in ("memory_gib", "peak_tflops", "intra_node_gb_s", "inter_node_gb_s"):
            check_positive(name, getattr(self, name))
        check_not_negative("reserved_gib", self.reserved_gib)
        if self.reserved_gib >= self.memory_gib:
            raise ConfigError("reserved_gib", f"must be < memory_gib ({self.memory_gib})", self.reserved_gib)

    @property
    def usable_bytes(self) -> int:
        """Memory of a device for training."""
        return int((self.memory_gib - self.reserved_gib) * 2**30)


@dataclass(frozen=True)
class Group:
    """Ranks that communicate: the same number on each of some nodes.

    Attributes:
        nodes: Nodes that they are on.
        per_node: Ranks on each.
    """

    nodes: int
    per_node: int

    @property
    def size(self) -> int:
        """All ranks."""
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Cluster:
    """Some nodes of one kind, a rank per device; neighbouring ranks share a node.

    Attributes:
        hardware: The kind of node.
        nodes: How many.
        expert_parallel: Ranks that hold all experts together, for the layout `ep`.
    """

    hardware: Hardware
    nodes: int
    expert_parallel: int = 1

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: There is no node, or the ranks do not divide into groups of `expert_parallel`, or such a
                group begins in the middle of a node.
        """
        check_positive_integers(nodes=self.nodes, expert_parallel=self.expert_parallel)
        per_node, size = self.hardware.devices_per_node, self.expert_parallel
        if self.ranks % size:
            ranks = f"{self.nodes} x {per_node} = {self.ranks}"
            raise ConfigError("expert_parallel", f"must divide the ranks ({ranks})", size)
        if size % per_node and per_node % size:
            raise ConfigError(
                "expert_parallel",
                f"must divide the devices of a node ({per_node}) or be a multiple of them",
                size,
            )

    @property
    def ranks(self) -> int:
        """All devices."""
        return self.nodes * self.hardware.devices_per_node

    @property
    def everyone(self) -> Group:
        """All ranks."""
        return Group(self.nodes, self.hardware.devices_per_node)

    @property
    def expert_group(self) -> Group:
        """Neighbouring ranks that hold all experts together."""
        per_node = min(self.expert_parallel, self.hardware.devices_per_node)
        return Group(self.expert_parallel // per_node, per_node)

    @property
    def replica_group(self) -> Group:
        """Ranks that hold the same experts: one of each `expert_group`."""
        per_node = self.hardware.devices_per_node // self.expert_group.per_node
        return Group(self.ranks // self.expert_parallel // per_node, per_node)
