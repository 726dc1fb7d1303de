"""Rows that travel to their experts and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from moe_plugin.apps.plan.cluster import Cluster
from moe_plugin.apps.plan.meta_model import autocast_of, selection_of, width_of
from moe_plugin.apps.plan.traffic import Transfer
from moe_plugin.apps.plan.workload import Workload
from moe_plugin.attach.discovery.routed_experts import RoutedExperts, find_routed_experts
from moe_plugin.experts import GroupedExperts


@dataclass(frozen=True)
class RowExchange:
    """The all-to-all of a step under an even load.

    Attributes:
        transfers: The collectives: rows, and before them how many there are.
        nodes_per_token: Mean number of nodes that a token's experts are on, as the routers choose.
        nodes_per_token_without_limit: The same without groups.
        inter_node: Bytes that a rank sends to other nodes, a row for each expert: what this library does.
        inter_node_once: The same if a row went to each node once, for all its experts there, without groups.
        inter_node_once_limited: The same with the routers' groups, as DeepSeek-V3 does.
    """

    transfers: Sequence[Transfer]
    nodes_per_token: float
    nodes_per_token_without_limit: float
    inter_node: float
    inter_node_once: float
    inter_node_once_limited: float


def row_exchange(model: nn.Module, work: Workload, cluster: Cluster) -> RowExchange:
    """Return the all-to-all of a step.

    A forward sends a row of hidden states per token and expert and gets one back; the backward does the same with
    gradients; with activation checkpointing the forward happens twice.

    Args:
        model: On the meta device.
        work: What is to be trained.
        cluster: Where.
    """
    routed, group, selection = find_routed_experts(model), cluster.expert_group, selection_of(model)
    tokens = work.micro_batch * work.sequence_length
    forwards = 2 if work.activation_checkpointing else 1
    journeys = 2 * (forwards + 1)
    per_token = journeys * sum(width_of(model) * _row_item_bytes(model, e, work) for e in routed)
    rows = tokens * per_token * selection.top_k
    sizes = 4 * forwards * sum(experts.num_experts for experts in routed)  # int32
    nodes = selection.expected_nodes(group.nodes)
    free = selection.without_limit().expected_nodes(group.nodes)
    remote = (group.nodes - 1) / group.nodes
    rows_sent = Transfer("expert rows", "all_to_all", group, journeys * len(routed), rows)
    return RowExchange(
        transfers=[
            rows_sent,
            Transfer("expert row counts", "all_to_all", group, forwards * len(routed), sizes),
        ],
        nodes_per_token=nodes,
        nodes_per_token_without_limit=free,
        inter_node=rows_sent.inter_node,
        inter_node_once=tokens * per_token * free * remote,
        inter_node_once_limited=tokens * per_token * nodes * remote,
    )


def _row_item_bytes(model: nn.Module, experts: RoutedExperts, work: Workload) -> int:
    """Return the bytes per number of a row: our experts cast rows before they travel, those of transformers do not."""
    autocast = autocast_of(work.precision)
    if autocast is not None:
        return (autocast if isinstance(experts.module, GroupedExperts) else torch.float32).itemsize
    return next(model.parameters()).element_size()
