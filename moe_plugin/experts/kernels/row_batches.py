"""Experts with about as many rows, multiplied together, their rows padded to one of few numbers.

Shape legend: E experts, B experts of a batch, M rows of each, P token-expert pairs, N rows with padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 4096
"""Rows of a batch, if it has more than one expert."""
ALONE = 768
"""An expert with more rows is a batch: its weights then need no copy, and no more is held at once."""
FILLED = 0.85
"""Share of the rows that each of several experts of a batch fills at least."""
FINEST = 8
"""Numbers of rows are multiples of this, and of the largest power of two up to a 32nd of them."""


class Batch(NamedTuple):
    """Experts that are multiplied together.

    Attributes:
        experts: Their ids, B of them.
        loads: Pairs of each.
        height: Rows of each, M, with padding.
        pairs: Place of its pairs among those of all batches.
        rows: Place of its rows among those of all batches.
    """

    experts: list[int]
    loads: list[int]
    height: int
    pairs: slice
    rows: slice


class BatchLayout(NamedTuple):
    """Batches of experts, and the pair of each row.

    Attributes:
        batches: From the fullest experts down.
        pair_ids_P: Pairs in the order of the batches.
        rows_P: The row of each of them.
        sources_N: The place in that order of each row's pair; a row of padding has the first pair of its expert.
    """

    batches: list[Batch]
    pair_ids_P: Tensor
    rows_P: Tensor
    sources_N: Tensor


def lay_out(pair_ids_P: Tensor, ends: Sequence[int]) -> BatchLayout:
    """Put pairs in batches.

    Args:
        pair_ids_P: Pairs sorted by expert.
        ends: Where those of each expert end.
    """
    begins = (0, *ends[:-1])
    found = batches([end - begin for begin, end in zip(begins, ends, strict=True)])
    experts = [expert for batch in found for expert in batch.experts]
    loads_E = torch.tensor([load for batch in found for load in batch.loads], dtype=torch.int64)
    heights_E = torch.tensor([b.height for b in found for _ in b.experts], dtype=torch.int64)
    begins_E = torch.tensor([begins[expert] for expert in experts], dtype=torch.int64)
    firsts_E = loads_E.cumsum(0) - loads_E
    all_P = torch.arange(len(pair_ids_P))
    within_P = all_P - firsts_E.repeat_interleave(loads_E)
    rows_P = (heights_E.cumsum(0) - heights_E).repeat_interleave(loads_E) + within_P
    sources_N = firsts_E.repeat_interleave(heights_E).scatter_(0, rows_P, all_P)
    order_P = begins_E.repeat_interleave(loads_E) + within_P
    return BatchLayout(found, pair_ids_P.index_select(0, order_P), rows_P, sources_N)


def batches(loads: Sequence[int]) -> list[Batch]:
    """Return experts with any pair, from the fullest down, by 1, 2, 4, 8...: few shapes of products occur.

    Args:
        loads: Pairs of each expert.
    """
    order = sorted((e for e, load in enumerate(loads) if load), key=loads.__getitem__, reverse=True)
    found, first, pair, row = [], 0, 0, 0
    while first < len(order):
        height = _rounded_up(loads[order[first]])
        size = 1 if height > ALONE else 1 << max(0, (ROWS // height).bit_length() - 1)
        while size > 1 and (first + size > len(order) or loads[order[first + size - 1]] < FILLED * height):
            size //= 2
        experts = order[first : first + size]
        their = [loads[expert] for expert in experts]
        pairs, rows = slice(pair, pair + sum(their)), slice(row, row + size * height)
        found.append(Batch(experts, their, height, pairs, rows))
        first, pair, row = first + size, pairs.stop, rows.stop
    return found


def _rounded_up(load: int) -> int:
    step = max(FINEST, 1 << max(0, (load // 32).bit_length() - 1))
    return -(-load // step) * step
