"""The global load of each validation batch.

Shape legend: N batches, L MoE layers, E experts (of the layer that has most).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from moe_plugin.attach.balanced_model import BalancedModel
from moe_plugin.balancing.reduce import all_reduce_
from moe_plugin.metrics import stack_layers
from moe_plugin.metrics.window import PENDING_BATCHES


class ValidationLoad(NamedTuple):
    """The load of each validation batch over all ranks; int64, on the host.

    Attributes:
        tokens_per_expert_NLE: Zero past the last expert of a layer.
        tokens_NL: Tokens that the layers saw.
    """

    tokens_per_expert_NLE: Tensor
    tokens_NL: Tensor

    def experts_per_token(self) -> float:
        """Return the mean over all tokens and layers; NaN without tokens."""
        selections_L = self.tokens_per_expert_NLE.sum((0, 2))
        return (selections_L.double() / self.tokens_NL.sum(0)).mean().item()


class ValidationCounts:
    """The counts of this rank's validation batches, summed over ranks at the end.

    The run needs one collective, so ranks may have different numbers of batches.

    Args:
        balanced: The sites whose evaluation counts are taken; they start from zero.
    """

    def __init__(self, balanced: BalancedModel) -> None:
        """Forget what was counted before."""
        self._balanced = balanced
        self._on_device: list[Tensor] = []
        self._on_host: list[Tensor] = []
        self._zero_()

    def take_(self) -> None:
        """End a batch: keep the counts since the last call."""
        tokens_L = torch.stack([site.eval_tokens for site in self._balanced.values()])
        counts_LE = stack_layers(site.eval_counts for site in self._balanced.values())
        self._on_device.append(torch.cat([counts_LE, tokens_L[:, None]], dim=1))
        self._zero_()
        if len(self._on_device) == PENDING_BATCHES:
            self._to_host_()

    def reduced(self, device: torch.device) -> ValidationLoad:
        """Return the load of each batch over all ranks; every rank must call it.

        Args:
            device: Where the process group communicates.
        """
        self._to_host_()
        counts = torch.cat(self._on_host) if self._on_host else self._no_batches()
        if dist.is_available() and dist.is_initialized():
            counts = self._over_ranks(counts, device)
        return ValidationLoad(counts[..., :-1], counts[..., -1])

    def _over_ranks(self, counts: Tensor, device: torch.device) -> Tensor:
        group = self._balanced.process_group
        batches = torch.tensor(len(counts), device=device)
        dist.all_reduce(batches, op=dist.ReduceOp.MAX, group=group)
        counts = pad(counts, (0, 0, 0, 0, 0, int(batches) - len(counts))).to(device)
        all_reduce_([counts], group)
        return counts.cpu()

    def _zero_(self) -> None:
        for site in self._balanced.values():
            site.forget_eval_()

    def _to_host_(self) -> None:
        if self._on_device:
            self._on_host.append(torch.stack(self._on_device).cpu())
            self._on_device.clear()

    def _no_batches(self) -> Tensor:
        sizes = [site.num_routed for site in self._balanced.values()]
        return torch.zeros(0, len(sizes), max(sizes) + 1, dtype=torch.int64)
