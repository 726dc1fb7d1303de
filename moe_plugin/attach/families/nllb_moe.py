"""NLLB-MoE: two experts by two calls of argmax, the first on probabilities, the second on logits (arXiv 2207.04672)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_plugin.attach.adapter import Adapter, Replaced


def route(block: Any, select: Any, *args: Any, **kwargs: Any) -> Any:
    """Make both choices among probabilities, to which the bias is added; see `Adapter` for the arguments."""
    is_second = False

    def largest(scores: Tensor, dim: int = -1) -> Tensor:
        nonlocal is_second
        probabilities = scores.softmax(-1) if is_second else scores
        is_second = True
        chosen = scores.isfinite()  # the first choice is masked by -inf
        return select(probabilities.masked_fill(~chosen, float("-inf")), 1)[1].squeeze(-1)

    with Replaced((torch.argmax, Tensor.argmax), largest):
        return type(block).forward(block, *args, **kwargs)


ADAPTER = Adapter(block="NllbMoeTop2Router", route=route, top_k=2)
