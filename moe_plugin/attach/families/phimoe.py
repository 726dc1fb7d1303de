"""Phi-3.5-MoE: SparseMixer picks two experts one after the other, by sampling in training (arXiv 2409.12136)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_plugin.attach.adapter import Adapter, Replaced


def route(block: Any, select: Any, *args: Any, **kwargs: Any) -> Any:
    """Bias each pick of the router; see `Adapter` for the arguments.

    A pick calls ``max`` up to three times: for the threshold below which experts are masked, to sample, and, in
    training, to check whether the sample was the most likely expert. The first two decide. Only what the threshold is
    taken from is neither sampled nor masked.
    """
    calls, per_pick = 0, 3 if block.training else 1
    plain: Tensor

    def largest(scores: Tensor, dim: int = -1, keepdim: bool = False) -> Any:
        nonlocal calls, plain
        which, calls = calls % per_pick, calls + 1
        if which == 2:
            return None
        if which == 0:
            plain = scores
        is_pick = which == (1 if block.training else 0)
        values, ids = select(scores, 1, plain, counts=is_pick)
        return torch.return_types.max((values, ids) if keepdim else (values.squeeze(dim), ids.squeeze(dim)))

    with Replaced((torch.max, Tensor.max), largest):
        return type(block).forward(block, *args, **kwargs)


ADAPTER = Adapter(block="PhimoeTopKRouter", route=route)
