"""The global load of each validation batch.

Shape legend: N batches, L MoE layers, E experts (of the layer that has most).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from moe_plugin.balance import Balanced
from moe_plugin.balancing.reduce import all_reduce_
from moe_plugin.metrics import stack_layers
from moe_plugin.metrics.window import PENDING_BATCHES


class ValidationCounts:
    """Keeps the counts of this rank's validation batches, and sums them over ranks when all are through.

    One collective for the whole run, so that ranks may have different numbers of batches.

    Args:
        balanced: The sites whose evaluation counts are taken; they start from zero.
    """

    def __init__(self, balanced: Balanced) -> None:
        """Forget what was counted before."""
        self._balanced = balanced
        self._on_device: list[Tensor] = []
        self._on_host: list[Tensor] = []
        self._zero_()

    def take_(self) -> None:
        """End a batch: keep what was counted since the last call."""
        self._on_device.append(stack_layers(site.eval_counts for site in self._balanced.values()))
        self._zero_()
        if len(self._on_device) == PENDING_BATCHES:
            self._to_host_()

    def reduced(self, device: torch.device) -> Tensor:
        """The counts of each batch over all ranks; int64 (N, L, E), on the host.

        Every rank must call it.

        Args:
            device: Where the process group communicates.
        """
        self._to_host_()
        tokens_NLE = torch.cat(self._on_host) if self._on_host else self._no_batches()
        if not (dist.is_available() and dist.is_initialized()):
            return tokens_NLE
        group = self._balanced.process_group
        batches = torch.tensor(len(tokens_NLE), device=device)
        dist.all_reduce(batches, op=dist.ReduceOp.MAX, group=group)
        tokens_NLE = pad(tokens_NLE, (0, 0, 0, 0, 0, int(batches) - len(tokens_NLE))).to(device)
        all_reduce_([tokens_NLE], group)
        return tokens_NLE.cpu()

    def _zero_(self) -> None:
        for site in self._balanced.values():
            site.eval_counts.zero_()

    def _to_host_(self) -> None:
        if self._on_device:
            self._on_host.append(torch.stack(self._on_device).cpu())
            self._on_device.clear()

    def _no_batches(self) -> Tensor:
        sizes = [site.num_experts for site in self._balanced.values()]
        return torch.zeros(0, len(sizes), max(sizes), dtype=torch.int64)
