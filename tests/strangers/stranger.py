"""What describes a block of the shape of a public repository's, and the small sizes of all of them.

Shape legend: B batch, S sequence, T tokens, D model width, E experts, K experts selected per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

B, S, D, E = 2, 12, 8, 6
T = B * S

Reference = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Computes, from a block, its input and a bias, the ids (T, K) in order and the output, slowly and without hooks."""


def sequences() -> Tensor:
    """Return an input (B, S, D)."""
    return torch.randn(B, S, D)


def tokens() -> Tensor:
    """Return an input (T, D)."""
    return torch.randn(T, D)


@dataclass(frozen=True)
class Stranger:
    """A block, where its shape is from, and what must hold.

    Attributes:
        repository: Owner and name on GitHub.
        commit: The commit that was read.
        path: The file that was read.
        build: Makes the block.
        reference: What it must compute; None if it must be refused.
        refused: What the error must say, a pattern; empty if the block must be balanced.
        may_refuse: Whether an error that names the router is as good as being right.
        top_k: K.
        router: Name of the router in the block.
        bias_name: The selection bias that the block owns.
        in_order: Whether ids come in the order of the ranking.
        inputs: Makes an input.
        shared: Containers of the block's file, in which it keeps losses, counts or generators.
    """

    repository: str
    commit: str
    path: str
    build: Callable[[], nn.Module]
    reference: Reference | None = None
    refused: str = ""
    may_refuse: bool = False
    top_k: int = 2
    router: str = ""
    bias_name: str | None = None
    in_order: bool = True
    inputs: Callable[[], Tensor] = sequences
    shared: Sequence[Any] = ()


def random_(block: nn.Module, scale: float = 0.3) -> nn.Module:
    """Draw every parameter from a normal distribution: some hosts begin with zeros, which route at random.

    Args:
        block: The block.
        scale: Standard deviation.
    """
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=scale)
    return block
