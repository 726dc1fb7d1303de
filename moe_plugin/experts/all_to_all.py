"""Rows to the ranks that hold their experts, and back.

Shape legend: P rows of this rank, Q rows that it receives, R ranks, E experts, X = E / R experts per rank, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Exchange(NamedTuple):
    """Which rank sends how many rows to which, zero included.

    Attributes:
        sent_R: Rows that this rank sends to each rank.
        received_R: Rows that it receives from each rank.
        expert_ids_Q: The expert of each received row, counted from this rank's first; int64. Rows are sorted by sender,
            and by expert within a sender.
        group: The expert-parallel ranks.
    """

    sent_R: list[int]
    received_R: list[int]
    expert_ids_Q: Tensor
    group: dist.ProcessGroup

    def to_experts(self, rows_PD: Tensor) -> Tensor:
        """Send rows sorted by expert to the ranks of their experts: (Q, D)."""
        return _AllToAll.apply(rows_PD, self.sent_R, self.received_R, self.group)

    def to_tokens(self, rows_QD: Tensor) -> Tensor:
        """Send rows back to the ranks that they came from: (P, D)."""
        return _AllToAll.apply(rows_QD, self.received_R, self.sent_R, self.group)


def plan_exchange(rows_per_expert_E: Tensor, group: dist.ProcessGroup) -> Exchange:
    """Tell the ranks how many rows they will receive for each of their experts; all of them must call it.

    Args:
        rows_per_expert_E: Rows of this rank for each expert, any integer dtype.
        group: The ranks; the first holds the first E / R experts, and so on.
    """
    num_ranks = dist.get_world_size(group)
    sent_RX = rows_per_expert_E.view(num_ranks, -1)
    received_RX = torch.empty_like(sent_RX)
    dist.all_to_all_single(received_RX, sent_RX, group=group)
    # The only place that waits for the device: the host has to know the sizes of what it receives.
    sent_R, received_R = torch.stack([sent_RX.sum(1), received_RX.sum(1)]).tolist()
    ids_RX = torch.arange(sent_RX.shape[1], device=sent_RX.device).repeat(num_ranks)
    expert_ids_Q = ids_RX.repeat_interleave(received_RX.flatten(), output_size=sum(received_R))
    return Exchange(sent_R, received_R, expert_ids_Q, group)


class _AllToAll(torch.autograd.Function):
    """An exchange of rows; its gradient is the exchange the other way round."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent_R: list[int], received_R: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.way_back = received_R, sent_R, group
        received = rows.new_empty(sum(received_R), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), received_R, sent_R, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(gradients[0], *ctx.way_back), None, None, None
