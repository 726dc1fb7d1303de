"""A whole training step of the small model compared with transformers' Qwen3-MoE, both compiled.

As in `train_step`, with `torch.compile` around each side's forward. transformers computes experts by `grouped_mm`,
since `eager` loops over them in Python, and attention by `sdpa` or `eager`, whichever is faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.cases.train_step import ATTENTIONS, PRECISIONS, our_step, over_best_peer, peer_step
from benchmarks.row import Row


def rows(rounds: int = 8, batch: int = 4) -> Iterator[Row]:
    """Yield our step over the peer's in each precision; `batch` is sequences of 256 tokens."""
    for precision in PRECISIONS:
        sides = {"ours": partial(our_step, precision, torch.compile)} | {
            f"grouped_mm, {attention}": partial(peer_step, "grouped_mm", attention, precision, torch.compile)
            for attention in ATTENTIONS
        }
        yield over_best_peer("compiled step of small", sides, precision, rounds, batch)
