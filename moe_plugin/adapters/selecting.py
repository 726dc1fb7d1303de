"""The torch calls by which routers select experts, read from their arguments.

Shape legend: T tokens, K experts selected per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """One ranking call: ``kind`` is topk, sort, argsort, argmax or max; ``k`` is 0 where all items are ranked."""

    kind: str
    scores: Tensor
    k: int
    dim: int
    keepdim: bool = True

    @property
    def num_items(self) -> int:
        """How many items were ranked."""
        return self.scores.shape[self.dim]


def read_call(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Call | None:
    """What a call of one of `SELECTING` ranks; None if it is no ranking from the largest down along one dimension."""
    return _READERS[func](*args, **kwargs)


# The readers have torch's own parameters, so that Python tells positional from named ones.


def _topk(
    input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True, **_: Any
) -> Call | None:
    return _call("topk", input, k, dim) if largest and isinstance(k, int) else None


def _sort(
    input: Tensor, dim: int = -1, descending: bool = False, stable: bool = False, **_: Any
) -> Call | None:
    return _call("sort", input, 0, dim) if descending else None


def _argsort(input: Tensor, dim: int = -1, descending: bool = False, **_: Any) -> Call | None:
    return _call("argsort", input, 0, dim) if descending else None


def _argmax(input: Tensor, dim: int | None = None, keepdim: bool = False, **_: Any) -> Call | None:
    return _call("argmax", input, 1, dim, keepdim)


def _max(input: Tensor, dim: int | None = None, keepdim: bool = False, **_: Any) -> Call | None:
    return _call("max", input, 1, dim, keepdim)


def _call(kind: str, scores: Tensor, k: int, dim: Any, keepdim: bool = True) -> Call | None:
    num_dims = scores.dim()
    return Call(kind, scores, k, dim % num_dims, keepdim) if isinstance(dim, int) and num_dims else None


_FUNCTIONS: dict[str, tuple[Callable, ...]] = {
    "topk": (torch.topk, Tensor.topk),
    "sort": (torch.sort, Tensor.sort),
    "argsort": (torch.argsort, Tensor.argsort),
    "argmax": (torch.argmax, Tensor.argmax),
    "max": (torch.max, Tensor.max),
}
_READ = {"topk": _topk, "sort": _sort, "argsort": _argsort, "argmax": _argmax, "max": _max}
_READERS = {function: _READ[kind] for kind, functions in _FUNCTIONS.items() for function in functions}
SELECTING = frozenset(_READERS)
NAMES = frozenset(_FUNCTIONS)
_TOGETHER = (("topk",), ("sort", "argsort"), ("argmax", "max"))
FUNCTIONS: dict[str, frozenset[Callable]] = {
    kind: frozenset(function for each in kinds for function in _FUNCTIONS[each])
    for kinds in _TOGETHER
    for kind in kinds
} | {"adapter": frozenset()}
"""By kind, the functions with which a host of that kind selects: argmax gives the ids, max also their values."""
