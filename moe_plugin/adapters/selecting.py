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

    @property
    def num_items(self) -> int:
        """How many items were ranked."""
        return self.scores.shape[self.dim]


# Per kind: the functions, and the names of their positional arguments.
_SIGNATURES: dict[str, tuple[tuple[Callable, ...], tuple[str, ...]]] = {
    "topk": ((torch.topk, Tensor.topk), ("input", "k", "dim", "largest", "sorted")),
    "sort": ((torch.sort, Tensor.sort), ("input", "dim", "descending", "stable")),
    "argsort": ((torch.argsort, Tensor.argsort), ("input", "dim", "descending", "stable")),
    "argmax": ((torch.argmax, Tensor.argmax), ("input", "dim", "keepdim")),
    "max": ((torch.max, Tensor.max), ("input", "dim", "keepdim")),
}
_KINDS = {function: kind for kind, (functions, _) in _SIGNATURES.items() for function in functions}
SELECTING = frozenset(_KINDS)
NAMES = frozenset(_SIGNATURES)
_ORDERING = ("sort", "argsort")
_ALONG_LAST = ("topk", *_ORDERING)
_TOGETHER = (("topk",), ("sort", "argsort"), ("argmax", "max"))
FUNCTIONS: dict[str, frozenset[Callable]] = {
    kind: frozenset(function for each in kinds for function in _SIGNATURES[each][0])
    for kinds in _TOGETHER
    for kind in kinds
} | {"adapter": frozenset()}
"""By kind, the functions with which a host of that kind selects: argmax gives the ids, max also their values."""


def kind_of(func: Callable) -> str:
    """The kind of one of `SELECTING`."""
    return _KINDS[func]


def arguments(func: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a selecting call by name."""
    named = dict(zip(_SIGNATURES[_KINDS[func]][1], args, strict=False)) | kwargs
    if "self" in named:
        named["input"] = named.pop("self")
    return named


def read_call(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Call | None:
    """What a call of one of `SELECTING` ranks; None if it is no ranking from the largest down along one dimension."""
    return read_arguments(_KINDS[func], arguments(func, args, kwargs))


def read_arguments(kind: str, named: dict[str, Any]) -> Call | None:
    """The same, from `arguments`."""
    scores = named["input"]
    dim = named.get("dim", -1 if kind in _ALONG_LAST else None)
    if not isinstance(dim, int) or scores.dim() == 0:
        return None
    if kind == "topk" and not named.get("largest", True):
        return None
    if kind in _ORDERING and not named.get("descending", False):
        return None
    k = named.get("k", 0) if kind == "topk" else 0 if kind in _ORDERING else 1
    return Call(kind, scores, k, dim % scores.dim()) if isinstance(k, int) else None
