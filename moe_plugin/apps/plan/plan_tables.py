"""The plan as tables for a terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import Any

from rich.console import Group
from rich.table import Table

from moe_plugin.apps.plan.cluster import Cluster
from moe_plugin.apps.plan.exchange import RowExchange
from moe_plugin.apps.plan.memory import RankMemory
from moe_plugin.apps.plan.scale_plan import ScalePlan
from moe_plugin.apps.plan.traffic import Transfer
from moe_plugin.apps.plan.workload import Workload


def plan_tables(plan: ScalePlan, cluster: Cluster, work: Workload) -> Group:
    """Return all tables.

    Args:
        plan: What was planned.
        cluster: Where.
        work: What is to be trained.
    """
    tables = [_memory_table(plan, cluster, work), _traffic_table(plan, cluster)]
    if plan.exchange is not None:
        tables += [_exchange_table(plan.exchange, cluster), _imbalance_table(plan)]
    return Group(*tables)


def as_json(plan: ScalePlan, cluster: Cluster, work: Workload) -> dict[str, Any]:
    """Return the plan, what it is for, and what follows from its fields, as plain values; see `plan_tables`."""
    written = asdict(plan)
    for name, layout in plan.layouts.items():
        written["layouts"][name]["memory"]["total"] = layout.memory.total
        written["layouts"][name]["traffic"] = [_transfer_json(t, cluster) for t in layout.traffic]
    if plan.exchange is not None:
        del written["exchange"]["transfers"]  # They are among the traffic of ep.
    asked = {key: value for key, value in vars(work).items() if key != "build"}
    return {"cluster": asdict(cluster), "workload": asked, **written}


def _transfer_json(transfer: Transfer, cluster: Cluster) -> dict[str, Any]:
    links = {"intra_node": transfer.intra_node, "inter_node": transfer.inter_node}
    return asdict(transfer) | links | {"seconds": transfer.seconds(cluster.hardware)}


def _memory_table(plan: ScalePlan, cluster: Cluster, work: Workload) -> Table:
    title = f"A step of {work.micro_batch} x {work.sequence_length} tokens per rank, {work.precision}" + (
        ", layers checkpointed" if work.activation_checkpointing else ""
    )
    table = _table(title, ["Memory of a rank, GiB"], plan.layouts)
    table.caption, table.caption_justify = _caption(plan, cluster), "left"
    memories = [layout.memory for layout in plan.layouts.values()]
    for field in fields(RankMemory):
        table.add_row(field.name, *(_gib(getattr(memory, field.name)) for memory in memories))
    table.add_section()
    table.add_row("total", *(_gib(memory.total) for memory in memories), style="bold")
    limit = cluster.hardware.usable_bytes
    table.add_row(f"fits in {_gib(limit)}", *("yes" if p.fits else "no" for p in plan.layouts.values()))
    largest = (str(layout.largest_micro_batch or "none") for layout in plan.layouts.values())
    table.add_row("largest micro-batch, sequences", *largest)
    return table


def _caption(plan: ScalePlan, cluster: Cluster) -> str:
    return (
        f"{plan.parameters / 1e9:,.2f} B parameters, {plan.active_parameters / 1e9:,.2f} B active. "
        f"{cluster.ranks} ranks on {cluster.nodes} nodes of {cluster.hardware.name}. "
        f"Operations of a step at the peak: {plan.compute_seconds:.3g} s."
    )


def _traffic_table(plan: ScalePlan, cluster: Cluster) -> Table:
    numbers = ("ranks", "calls", "GiB within node", "GiB to other nodes", "seconds, at least")
    table = _table("What a rank sends in a step", ("layout", "for", "collective"), numbers)
    for name, layout in plan.layouts.items():
        for transfer in layout.traffic:
            table.add_row(
                name,
                transfer.name,
                transfer.operation,
                str(transfer.group.size),
                str(transfer.calls),
                _gib(transfer.intra_node),
                _gib(transfer.inter_node),
                f"{transfer.seconds(cluster.hardware):.3g}",
            )
        total = f"{layout.communication_seconds:.3g}"
        table.add_row(name, "all", *[""] * 5, total, end_section=True)
    return table


def _exchange_table(exchange: RowExchange, cluster: Cluster) -> Table:
    title = f"Expert rows from a rank to other nodes (experts on {cluster.expert_group.nodes})"
    table = _table(title, ["way"], ["GiB", "nodes per token"])
    free, limited = exchange.nodes_per_token_without_limit, exchange.nodes_per_token
    table.add_row("a row per expert (this library)", _gib(exchange.inter_node), f"{limited:.2f}")
    table.add_row("a row per node, no node limit", _gib(exchange.inter_node_once), f"{free:.2f}")
    table.add_row(
        "a row per node, the routers' groups", _gib(exchange.inter_node_once_limited), f"{limited:.2f}"
    )
    return table


def _imbalance_table(plan: ScalePlan) -> Table:
    title = f"Uneven load under ep (experts are {plan.expert_share:.0%} of a forward's operations)"
    table = _table(title, ["MaxVio per rank"], ["throughput", "largest micro-batch"])
    for row in plan.imbalance:
        largest = str(row.largest_micro_batch or "none")
        table.add_row(f"{row.max_violation:g}", f"{row.throughput:.3f}", largest)
    return table


def _table(title: str, texts: Iterable[str], numbers: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in texts:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f}"
