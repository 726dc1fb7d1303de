"""Inputs for the tests of the kernels, and where kernels run: interpreted on a CPU, or compiled on a GPU."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch
from hypothesis import strategies as st

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            pytest.mark.skipif(INTERPRETED, reason="is interpreted on the CPU"),
        ],
    ),
]


class Pairs(NamedTuple):
    """Token-expert pairs, of which some are used, in the order of a random routing."""

    pair_ids_P: torch.Tensor
    num_tokens: int
    top_k: int

    @property
    def token_ids_P(self) -> torch.Tensor:
        return self.pair_ids_P // self.top_k


@st.composite
def pairs(draw: st.DrawFn) -> Pairs:
    """None, some or all used; int32 as the experts have them, or int64."""
    num_tokens, top_k = draw(st.integers(0, 6)), draw(st.integers(1, 4))
    order = draw(st.permutations(range(num_tokens * top_k)))
    used = draw(st.one_of(st.just(len(order)), st.integers(0, len(order))))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return Pairs(torch.tensor(order[:used], dtype=dtype), num_tokens, top_k)


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
WIDTHS = st.sampled_from([1, 3, 8, 33, 1025])
SEEDS = st.integers(0, 2**31)
