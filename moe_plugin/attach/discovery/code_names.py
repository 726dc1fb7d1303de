"""Read from a class's code which names it uses, without running it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType

from torch import nn

CALL_DEPTH = 2
"""How many calls of plain functions away from a class a name may be."""
TOP_K = frozenset({"topk"})


@cache
def uses(kind: type, wanted: frozenset[str]) -> bool:
    """Return whether the class's own code, or a plain function that it calls, uses one of these names.

    Args:
        kind: The class.
        wanted: The names.
    """
    return any(_reaches(function, wanted, CALL_DEPTH) for function in _functions(kind))


def _functions(kind: type) -> Iterator[FunctionType]:
    """Yield the functions of a class and of its bases up to ``nn.Module``, decorators looked through."""
    for base in kind.__mro__:
        if base is nn.Module:
            return
        for member in vars(base).values():
            function = inspect.unwrap(member) if callable(member) else getattr(member, "__func__", None)
            if isinstance(function, FunctionType):
                yield function


def _reaches(function: FunctionType, wanted: frozenset[str], depth: int) -> bool:
    names = _names_in(function.__code__)
    if names & wanted:
        return True
    called = (function.__globals__.get(name) for name in names) if depth else ()
    return any(isinstance(inner, FunctionType) and _reaches(inner, wanted, depth - 1) for inner in called)


def _names_in(code: CodeType) -> set[str]:
    nested = (_names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*nested)
