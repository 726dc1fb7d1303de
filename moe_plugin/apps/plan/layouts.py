"""How a model is laid out on ranks: what a rank holds, and what ranks send in a step of one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe_plugin.apps.plan.buffers import fsdp_buffers, kept_gradients, sharded_gradients
from moe_plugin.apps.plan.cluster import Cluster, Group
from moe_plugin.apps.plan.fsdp_units import Unit
from moe_plugin.apps.plan.memory import RankMemory, at_peak
from moe_plugin.apps.plan.timeline import Timeline
from moe_plugin.apps.plan.traffic import Transfer


class Layout(Protocol):
    """A way to lay out a model on ranks."""

    def memory(self, step: Timeline) -> RankMemory:
        """Return the memory of a rank.

        Args:
            step: A micro-batch on this layout's model and units.
        """
        ...

    def traffic(self) -> list[Transfer]:
        """Return the collectives for parameters and gradients."""
        ...


@dataclass(frozen=True)
class DistributedDataParallel:
    """A copy of the model on each rank.

    Attributes:
        units: The model's units; here nothing is gathered.
        cluster: The ranks.
    """

    units: Sequence[Unit]
    cluster: Cluster

    def memory(self, step: Timeline) -> RankMemory:
        """Return the memory; buckets hold the gradients a second time if there are several ranks."""
        gradients = sum(unit.trained_size for unit in self.units)
        buckets = gradients if self.cluster.ranks > 1 else 0
        return at_peak(
            step,
            parameters=sum(unit.size for unit in self.units),
            optimizer=2 * gradients,
            gradients_M=kept_gradients(step, set(range(len(self.units)))),
            buffers_M=torch.full_like(step.activations_M, buckets),
        )

    def traffic(self) -> list[Transfer]:
        """Return one all-reduce of the gradients, in buckets."""
        size = sum(unit.trained_size for unit in self.units)
        return [Transfer("gradients", "all_reduce", self.cluster.everyone, 1, size)]


@dataclass(frozen=True)
class FullySharded:
    """FSDP2, a unit per layer.

    Attributes:
        units: The root first.
        cluster: The ranks.
    """

    units: Sequence[Unit]
    cluster: Cluster

    def memory(self, step: Timeline) -> RankMemory:
        """Return the shards, and what is gathered."""
        ranks = self.cluster.ranks
        gathered = [ranks * unit.shard(ranks) for unit in self.units]
        shards = [unit.trained_shard(ranks) for unit in self.units]
        copies = self.cluster.hardware.gather_copies
        return at_peak(
            step,
            parameters=sum(unit.shard(ranks) for unit in self.units),
            optimizer=2 * sum(shards),
            gradients_M=sharded_gradients(step, shards),
            buffers_M=fsdp_buffers(step, gathered, copies=copies),
        )

    def traffic(self) -> list[Transfer]:
        """Return the parameters twice, except the root's, and the gradients."""
        return _sharded_traffic("", self.units, self.cluster.everyone, stays_gathered=1)


@dataclass(frozen=True)
class ExpertParallel:
    """Experts spread over neighbouring ranks, and all else as in `FullySharded`.

    Ranks with the same experts shard these among them.

    Attributes:
        units: The root first.
        experts: The units after them: each layer's experts of one rank.
        cluster: The ranks.
    """

    units: Sequence[Unit]
    experts: Sequence[Unit]
    cluster: Cluster

    def memory(self, step: Timeline) -> RankMemory:
        """Return the shards, and what is gathered."""
        everyone, replicas = self.cluster.ranks, self.cluster.replica_group.size
        shards = [unit.trained_shard(everyone) for unit in self.units]
        expert_shards = [unit.trained_shard(replicas) for unit in self.experts]
        parameters = sum(unit.shard(everyone) for unit in self.units)
        return at_peak(
            step,
            parameters=parameters + sum(unit.shard(replicas) for unit in self.experts),
            optimizer=2 * sum(shards + expert_shards),
            gradients_M=self._gradients(step, shards, expert_shards),
            buffers_M=self._buffers(step),
        )

    def traffic(self) -> list[Transfer]:
        """Return the collectives of `FullySharded`, those of experts among their own ranks."""
        dense = _sharded_traffic("", self.units, self.cluster.everyone, stays_gathered=1)
        replicas = self.cluster.replica_group
        if replicas.size == 1:
            return dense
        return dense + _sharded_traffic("expert ", self.experts, replicas, stays_gathered=0)

    def _gradients(self, step: Timeline, shards: list[int], expert_shards: list[int]) -> Tensor:
        if self.cluster.replica_group.size > 1:
            return sharded_gradients(step, [*shards, *expert_shards])
        numbers = range(len(self.units), len(self.units) + len(self.experts))
        dense_M = sharded_gradients(step, [*shards, *(0 for _ in self.experts)])
        return dense_M + kept_gradients(step, set(numbers))

    def _buffers(self, step: Timeline) -> Tensor:
        everyone, replicas = self.cluster.ranks, self.cluster.replica_group.size
        dense = [everyone * unit.shard(everyone) for unit in self.units]
        experts = [replicas * unit.shard(replicas) if replicas > 1 else 0 for unit in self.experts]
        by_width = set(range(len(dense), len(dense) + len(experts)))
        copies = self.cluster.hardware.gather_copies
        return fsdp_buffers(step, [*dense, *experts], copies=copies, by_width=by_width)


def _sharded_traffic(
    prefix: str, units: Sequence[Unit], group: Group, *, stays_gathered: int
) -> list[Transfer]:
    """Return the collectives of FSDP2; the first `stays_gathered` units are gathered only once."""
    ranks = group.size
    gathered = [ranks * unit.shard(ranks) for unit in units]
    again = gathered[stays_gathered:]
    trained = [ranks * unit.trained_shard(ranks) for unit in units if unit.trained_size]
    return [
        Transfer(f"{prefix}parameters, forward", "all_gather", group, len(gathered), sum(gathered)),
        Transfer(f"{prefix}parameters, backward", "all_gather", group, len(again), sum(again)),
        Transfer(f"{prefix}gradients", "reduce_scatter", group, len(trained), sum(trained)),
    ]
