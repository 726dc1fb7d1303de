"""The scale plan: memory, traffic and slowdown of a model's training step on a cluster, by layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_plugin.apps.models.size import measure
from moe_plugin.apps.plan.cluster import Cluster
from moe_plugin.apps.plan.exchange import RowExchange, row_exchange
from moe_plugin.apps.plan.layouts import DistributedDataParallel, ExpertParallel, FullySharded, Layout
from moe_plugin.apps.plan.memory import RankMemory, largest_that_fits
from moe_plugin.apps.plan.meta_model import autocast_of, bias_count_bytes, expert_share, routed_experts
from moe_plugin.apps.plan.steps import Steps, spread_steps, whole_steps
from moe_plugin.apps.plan.traffic import Transfer
from moe_plugin.apps.plan.workload import Workload


@dataclass(frozen=True)
class LayoutPlan:
    """What a step takes on one layout.

    Attributes:
        memory: Memory of a rank, at the worst moment of a step with the micro-batch asked for.
        fits: Whether that is within the device's memory.
        largest_micro_batch: Sequences per rank that fit; 0 if none does.
        traffic: All collectives of a step.
        communication_seconds: Least time that the links need for them, if nothing overlaps.
    """

    memory: RankMemory
    fits: bool
    largest_micro_batch: int
    traffic: Sequence[Transfer]
    communication_seconds: float


@dataclass(frozen=True)
class Imbalance:
    """Cost of an uneven load with experts spread over ranks.

    Attributes:
        max_violation: MaxVio per rank: (rows of the busiest rank - mean) / mean.
        throughput: Relative to an even load: 1 / (1 + f * MaxVio), f the expert share of a step.
        largest_micro_batch: Sequences per rank that fit on the busiest rank.
    """

    max_violation: float
    throughput: float
    largest_micro_batch: int


@dataclass(frozen=True)
class ScalePlan:
    """The plan of a model on a cluster.

    Attributes:
        parameters: Parameters of the model.
        active_parameters: Those that one token uses.
        compute_seconds: Time of a step's operations, recomputation included, at the device's peak.
        expert_share: Operations of routed experts among all of a forward: f in `Imbalance`.
        layouts: By name.
        exchange: Rows between ranks under `ep`; None without it.
        imbalance: Costs under `ep`.
    """

    parameters: int
    active_parameters: int
    compute_seconds: float
    expert_share: float
    layouts: Mapping[str, LayoutPlan]
    exchange: RowExchange | None
    imbalance: Sequence[Imbalance]


def make_plan(
    work: Workload, cluster: Cluster, layouts: Sequence[str], max_violations: Sequence[float]
) -> ScalePlan:
    """Plan a workload on a cluster without allocating it; a trace takes some milliseconds per layer.

    Args:
        work: What is to be trained.
        cluster: Where.
        layouts: Some of `LAYOUTS`.
        max_violations: For `ScalePlan.imbalance`.

    Raises:
        ConfigError: The model is no mixture of experts, or its experts cannot be spread like that.
    """
    model = work.build()
    routed, size = routed_experts(model), measure(model, context_length=work.sequence_length)
    share = expert_share(model, size.forward_flops_per_token)
    autocast = autocast_of(work.precision)
    counts = Transfer("bias counts", "all_reduce", cluster.everyone, 1, bias_count_bytes(routed))
    plans, exchange, imbalance = {}, None, []
    if {"ddp", "fsdp"} & set(layouts):
        steps = whole_steps(work.build, work.sequence_length, autocast)
        for name, kind in (("ddp", DistributedDataParallel), ("fsdp", FullySharded)):
            if name in layouts:
                plans[name] = _plan_layout(kind(steps.units, cluster), steps, work, cluster, [counts])
    if "ep" in layouts:
        exchange = row_exchange(model, work, cluster)
        steps = spread_steps(work.build, work.sequence_length, autocast, cluster.expert_parallel)
        first = len(steps.units) - steps.num_experts_apart
        layout = ExpertParallel(steps.units[:first], steps.units[first:], cluster)
        plans["ep"] = _plan_layout(layout, steps, work, cluster, [*exchange.transfers, counts])
        imbalance = [_imbalance(layout, steps, cluster, share, excess) for excess in max_violations]
    passes = 4 if work.activation_checkpointing else 3
    operations = passes * size.forward_flops_per_token * work.micro_batch * work.sequence_length
    return ScalePlan(
        parameters=size.total_parameters,
        active_parameters=size.active_parameters,
        compute_seconds=operations / cluster.hardware.peak_tflops / 1e12,
        expert_share=share,
        layouts=plans,
        exchange=exchange,
        imbalance=imbalance,
    )


def _plan_layout(
    layout: Layout, steps: Steps, work: Workload, cluster: Cluster, others: Sequence[Transfer]
) -> LayoutPlan:
    memory = layout.memory(steps.step(work.micro_batch))
    traffic = [*layout.traffic(), *others]
    return LayoutPlan(
        memory=memory,
        fits=memory.total <= cluster.hardware.usable_bytes,
        largest_micro_batch=_largest(layout, steps, cluster),
        traffic=traffic,
        communication_seconds=sum(transfer.seconds(cluster.hardware) for transfer in traffic),
    )


def _largest(layout: Layout, steps: Steps, cluster: Cluster, excess: float = 0.0) -> int:
    def total(sequences: int) -> int:
        return layout.memory(steps.step(sequences, excess)).total

    return largest_that_fits(total, cluster.hardware.usable_bytes)


def _imbalance(layout: Layout, steps: Steps, cluster: Cluster, share: float, excess: float) -> Imbalance:
    return Imbalance(excess, 1 / (1 + share * excess), _largest(layout, steps, cluster, excess))
