"""Doge: product keys. The two halves of a key are ranked in full first, then all pairs of them (arXiv 2412.11834)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_plugin.attach.adapter import Adapter, Replaced


def route(block: Any, select: Any, *args: Any, **kwargs: Any) -> Any:
    """Keep the halves in order, so a pair's position is its expert's id; see `Adapter` for the arguments."""

    def rank(scores: Tensor, k: int, dim: int = -1) -> Any:
        if k == scores.shape[-1]:
            return scores, torch.arange(k, device=scores.device).expand_as(scores)
        return select(scores, k)

    with Replaced((torch.topk, Tensor.topk), rank):
        return type(block).forward(block, *args, **kwargs)


ADAPTER = Adapter(block="DogeCDMoE", route=route)
