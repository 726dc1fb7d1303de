"""A whole training step of the small model beside transformers' Qwen3-MoE, both compiled.

As in `train_step`, with `torch.compile` around each side's forward. transformers computes experts by `grouped_mm`,
since `eager` loops over them in Python, and attention by `sdpa` or `eager`, whichever is faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.cases.train_step import (
    ATTENTIONS,
    PRECISIONS,
    Step,
    logits_of,
    over_best_peer,
    softmax_model,
    training_step,
)
from benchmarks.qwen3 import as_qwen3
from benchmarks.row import Row


def rows(rounds: int = 8, batch: int = 4) -> Iterator[Row]:
    """Our step over the peer's in each precision; `batch` is sequences of 256 tokens."""
    for precision in PRECISIONS:
        sides = {"ours": partial(our_step, precision)} | {
            f"grouped_mm, {attention}": partial(peer_step, attention, precision) for attention in ATTENTIONS
        }
        yield over_best_peer("compiled step of small", sides, precision, rounds, batch)


def our_step(precision: str) -> Step:
    """That of our model."""
    model = softmax_model()
    return training_step(model, torch.compile(model.forward), precision)


def peer_step(attention: str, precision: str) -> Step:
    """That of the same model of transformers."""
    peer = as_qwen3(softmax_model(), "grouped_mm", attention)
    return training_step(peer, torch.compile(partial(logits_of, peer)), precision)
