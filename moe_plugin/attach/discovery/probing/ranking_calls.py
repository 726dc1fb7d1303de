"""The torch calls by which routers select experts, read from their arguments.

Shape legend: T tokens, K experts selected per token, E experts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """One ranking call.

    Attributes:
        kind: topk, sort, argsort, argmax, max, argmin or min.
        scores: What was ranked.
        k: How many of the ranked items are returned; 0 if all are, in order.
        dim: Along which dimension, not negative.
        keepdim: Whether the result has that dimension.
        largest: Whether the largest come first.
    """

    kind: str
    scores: Tensor
    k: int
    dim: int
    keepdim: bool
    largest: bool

    @property
    def num_items(self) -> int:
        """How many items were ranked."""
        return self.scores.shape[self.dim]


class Use(NamedTuple):
    """How a router uses its selecting calls.

    Attributes:
        k: The k of the call; None if any will do, since the router ranks its experts in one call only.
        cut: Whether only some of what the call returns are selected: all of a sort, or a candidate more than needed.
        from_end: Whether those are the last instead of the first.
        rounds: How many calls select for one token, each among the experts that earlier ones left.
    """

    k: int | None = None
    cut: bool = False
    from_end: bool = False
    rounds: int = 1


_Read = tuple[str, Tensor, int, Any, bool, bool, dict[str, Any]]
"""The fields of a call, its dimension as it was given, and unknown arguments."""


def read_call(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Call | None:
    """Return what a call ranks; None if it does not rank along one dimension.

    Args:
        func: One of `SELECTING`.
        args: Positional arguments of the call.
        kwargs: Named arguments of the call.
    """
    kind, scores, k, dim, keepdim, largest, rest = _READERS[func](*args, **kwargs)
    num_dims = scores.dim()
    if rest or not isinstance(dim, int) or not num_dims:
        return None
    return Call(kind, scores, k, dim % num_dims, keepdim, largest)


# The readers have torch's own parameters, so Python matches positional and named arguments.


def _topk(
    input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True, **rest: Any
) -> _Read:
    number = k if isinstance(k, int) else operator.index(k)  # NumPy integers are not Python ints
    return "topk", input, number, dim, True, largest, rest


def _in_order(
    kind: str, input: Tensor, dim: int = -1, descending: bool = False, stable: bool = False, **rest: Any
) -> _Read:
    return kind, input, 0, dim, True, descending, rest


def _extreme(
    kind: str, largest: bool, input: Tensor, dim: int | None = None, keepdim: bool = False, **rest: Any
) -> _Read:
    return kind, input, 1, dim, keepdim, largest, rest


def _functions(name: str) -> Iterator[Callable]:
    """Yield function and method of this name, and the operator in all its overloads."""
    yield from (getattr(torch, name), getattr(Tensor, name))
    operators = getattr(torch.ops.aten, name)
    yield operators
    yield from (getattr(operators, overload) for overload in operators.overloads())


_READ: dict[str, Callable[..., _Read]] = {
    "topk": _topk,
    **{kind: partial(_in_order, kind) for kind in ("sort", "argsort")},
    **{kind: partial(_extreme, kind, True) for kind in ("argmax", "max")},
    **{kind: partial(_extreme, kind, False) for kind in ("argmin", "min")},
}
_FUNCTIONS = {name: tuple(_functions(name)) for name in _READ}
_READERS = {function: _READ[kind] for kind, functions in _FUNCTIONS.items() for function in functions}
SELECTING = frozenset(_READERS)
NAMES = frozenset(_FUNCTIONS) - {"min"}
"""Names in the code of modules that may select; ``min`` is in too many others."""
KINDS = (("topk",), ("sort", "argsort"), ("argmax", "max"), ("argmin", "min"))
"""Kinds of calls that a router may use together. Those with no other use than selecting come first."""
FUNCTIONS: dict[str, frozenset[Callable]] = {
    kind: frozenset(function for each in kinds for function in _FUNCTIONS[each])
    for kinds in KINDS
    for kind in kinds
} | {"adapter": frozenset(), "any": SELECTING}
"""By kind, the functions with which such a host selects: argmax gives the ids, max also their values."""
UNSTEERABLE = frozenset({"kthvalue", "multinomial", "gumbel_softmax"})
"""Names of calls that select experts without a place for a bias."""
