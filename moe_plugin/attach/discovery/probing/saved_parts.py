"""The parts of a program's state that code can change, each as it was, to be restored in place."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from operator import is_
from types import ModuleType
from typing import Any

from torch import Tensor, nn

PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes})
_LONG = 4096
"""Longer containers of plain values are compared by length only."""
_MISSING = object()


class SavedNames:
    """The attributes of a class, or the globals of a Python module."""

    def __init__(self, owner: Any, names: Mapping[str, Any]) -> None:
        """Save them.

        Args:
            owner: A class, or the dictionary itself.
            names: A live view of the namespace.
        """
        self._owner = owner
        self._names = names
        self._before = dict(names)

    def restore_(self) -> None:
        """Bind every name as before, except modules imported since, and names of Python's and of compilers' own."""
        if _same(self._names, self._before):
            return
        now, of_class = dict(self._names), isinstance(self._owner, type)
        put: Callable = type.__setattr__ if of_class else dict.__setitem__
        drop: Callable = type.__delattr__ if of_class else dict.__delitem__
        for name, value in now.items():
            if name not in self._before and not (isinstance(value, ModuleType) or name.startswith("__")):
                drop(self._owner, name)
        for name, value in self._before.items():
            if now.get(name, _MISSING) is not value:
                put(self._owner, name, value)


class SavedContent:
    """The content of a container, without what subclasses make of it."""

    KINDS = (OrderedDict, dict, list, set, deque)

    def __init__(self, container: Any) -> None:
        """Save it."""
        self._container = container
        self._kind = next(kind for kind in self.KINDS if isinstance(container, kind))
        self._before = self._content()
        self.parts = _parts(self._before)
        """The entries that may be changed themselves."""
        self._by_length = len(self._before) > _LONG and not self.parts

    def restore_(self) -> None:
        """Fill the container as before, if anything in it changed."""
        length = self._kind.__len__(self._container)
        if length == len(self._before) and (
            not length or self._by_length or _same(self._content(), self._before)
        ):
            return
        self._kind.clear(self._container)
        fill: Callable = getattr(self._kind, "extend", None) or self._kind.update  # pyright: ignore[reportAttributeAccessIssue]
        fill(self._container, self._before)

    def _content(self) -> Any:
        if not issubclass(self._kind, dict):
            return tuple(self._kind.__iter__(self._container))
        return dict.copy(self._container) if self._kind is dict else dict(self._kind.items(self._container))


class SavedAttribute:
    """An attribute that no dictionary holds: a slot, or the variable of an enclosing function in its cell."""

    def __init__(self, owner: Any, name: str) -> None:
        """Save it.

        Args:
            owner: The object or cell.
            name: The attribute.
        """
        self._owner = owner
        self._name = name
        self.before = self._value()
        """Its value; a marker if it has none yet."""

    def restore_(self) -> None:
        """Set the attribute as before."""
        if self._value() is self.before:
            return
        if self.before is _MISSING:
            object.__delattr__(self._owner, self._name)
        else:
            object.__setattr__(self._owner, self._name, self.before)

    def _value(self) -> Any:
        try:
            return getattr(self._owner, self._name, _MISSING)
        except ValueError:  # an empty cell
            return _MISSING


class SavedCache:
    """What `functools.lru_cache` remembers of a function. Its entries cannot be removed one by one."""

    def __init__(self, cached: Any) -> None:
        """Save how much it has computed."""
        self._cached = cached
        self._before = cached.cache_info().misses

    def restore_(self) -> None:
        """Forget everything if something was added."""
        if self._cached.cache_info().misses != self._before:
            self._cached.cache_clear()


def _parts(content: Any) -> list[Any]:
    values: Iterable[Any] = [*content, *content.values()] if isinstance(content, dict) else content
    return [value for value in values if type(value) not in PLAIN]


def _same(now: Any, before: Any) -> bool:
    if len(now) != len(before) or not all(map(is_, now, before)):
        return False
    return not isinstance(before, dict) or all(map(is_, now.values(), before.values()))


class SavedData:
    """The memory of a plain tensor, which a host may replace by another, of another dtype too."""

    def __init__(self, tensor: Tensor) -> None:
        """Save which it is; its values are not copied."""
        self._tensor = tensor
        self._before = tensor.data if type(tensor) in (Tensor, nn.Parameter) else None

    def restore_(self) -> None:
        """Give the tensor its memory back."""
        before, now = self._before, self._tensor
        if before is not None and (before.dtype != now.dtype or before.device != now.device):
            now.data = before
