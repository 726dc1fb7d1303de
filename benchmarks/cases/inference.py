"""Throughput of inference from 1 to 1,024 concurrent sequences of the tiny model: time per token over that of one.

Whole sequences are read at once, without gradients; there is no decoding token by token, and no cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.models import VOCABULARY, tiny_model
from benchmarks.row import Row
from benchmarks.turns import take_turns

SEQUENCES = (1, 4, 16, 64, 256, 1024)


def rows(rounds: int = 7, length: int = 32) -> Iterator[Row]:
    """Yield the time per token at each number of sequences of `length` tokens."""
    model = tiny_model().eval()

    def reading(sequences: int) -> Callable[[object], None]:
        tokens_BS = torch.randint(0, VOCABULARY, (sequences, length))

        def read(_: object) -> None:
            with torch.inference_mode():
                model(tokens_BS)

        return read

    turns = take_turns({str(n): reading(n) for n in SEQUENCES}, rounds)
    for sequences in SEQUENCES:
        low, median, high = (quartile / sequences for quartile in turns.ratio(str(sequences), "1"))
        milliseconds = turns.milliseconds(str(sequences))
        speed = f"{1e3 * sequences * length / milliseconds:,.0f} tokens/s"
        name = f"time per token, {sequences} sequences"
        yield Row(name, median, "1 sequence", low=low, high=high, milliseconds=milliseconds, note=speed)
