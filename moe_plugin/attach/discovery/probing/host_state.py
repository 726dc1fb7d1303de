"""All that the code of a host can change: attributes, containers, globals, class attributes, variables of closures."""

from __future__ import annotations

import argparse
import gc
import weakref
from collections.abc import Callable
from functools import cache, cached_property, lru_cache, partial
from types import (
    CellType,
    FunctionType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

from torch import Tensor, nn

from moe_plugin.attach.discovery.probing.reached_code import is_foreign, names_in, reached_globals
from moe_plugin.attach.discovery.probing.saved_parts import (
    PLAIN,
    SavedAttribute,
    SavedCache,
    SavedContent,
    SavedData,
    SavedNames,
)

_MOST_PARTS = 100_000
_CACHED = type(lru_cache(len))
_WRAPPERS = (
    *(tuple, frozenset, MappingProxyType, partial),
    *(property, staticmethod, classmethod, cached_property, MethodType),
)
"""Kinds of objects that do not change, but may hold what does."""
_UNCALLED = {
    *("__init__", "__new__", "__post_init__", "__init_subclass__"),
    *("__eq__", "__hash__", "__repr__", "__str__", "__getstate__", "__setstate__", "__reduce__"),
}
"""Special methods that make an object, or change none; Python calls others without naming them."""
_HOLDERS = (nn.Module, SimpleNamespace, argparse.Namespace)
"""Kinds of objects of torch and Python that hold what a host puts there."""


class HostState:
    """All that a module, those below it, and the code of their classes can change, as it is now."""

    def __init__(self, root: nn.Module, *more: object) -> None:
        """Save it for a module and those below it.

        Args:
            root: The module.
            more: Other objects that its code can change.
        """
        self.tensors: list[Tensor] = []
        """Every tensor that was reached."""
        self._saved: list[Any] = []
        self._seen: set[int] = set()
        self._names = {"forward"}
        self._unnamed: dict[str, list[Any]] = {}
        self._reached: list[Any] = [*root.modules(), *more]
        seen = self._seen
        for part in self._reached:  # which grows, and keeps the ids valid
            if id(part) not in seen and len(seen) < _MOST_PARTS:
                seen.add(id(part))
                _visit(type(part))(self, part)

    def restore_(self) -> None:
        """Restore what has changed since."""
        for saved in self._saved:
            saved.restore_()

    def visit_container(self, part: Any) -> None:
        """Save the entries, and the attributes if it has any."""
        self._save_content(part)
        if type(part) not in SavedContent.KINDS:
            self.visit_holder(part)

    def visit_holder(self, part: Any) -> None:
        """Save the attributes of an object."""
        kind = type(part)
        self._reached.append(kind)
        self._save_content(getattr(part, "__dict__", {}))
        for name in _slots(kind):
            self._save_attribute(part, name)

    def visit_wrapper(self, part: Any) -> None:
        """Go on to what it holds."""
        self._reached += gc.get_referents(part)

    def visit_weak(self, part: Any) -> None:
        """Go on to what it refers to."""
        self._reached.append(part())

    def visit_cached(self, part: Any) -> None:
        """Save how much a cache holds."""
        self._saved.append(SavedCache(part))
        self._reached.append(part.__wrapped__)

    def visit_cell(self, part: CellType) -> None:
        """Save a variable."""
        self._save_attribute(part, "cell_contents")

    def visit_tensor(self, part: Tensor) -> None:
        """Save the attributes of a tensor."""
        self.tensors.append(part)
        self._saved.append(SavedData(part))
        self._save_content(part.__dict__)

    def visit_function(self, part: FunctionType) -> None:
        """Save the variables, attributes, defaults and globals that a function uses."""
        self._save_content(part.__dict__)
        self._reached += [*(part.__closure__ or ()), part.__defaults__, part.__kwdefaults__]
        self._note_names(names_in(part.__code__))
        for space, values in reached_globals(part):
            self._reached += values
            self._reached += [value.__init__ for value in values if isinstance(value, type)]
            if id(space) not in self._seen:
                self._seen.add(id(space))
                self._saved.append(SavedNames(space, space))

    def visit_class(self, part: type) -> None:
        """Save the attributes of a class, of its bases and of its metaclass."""
        if is_foreign(part.__module__):
            return
        self._saved.append(SavedNames(part, vars(part)))
        self._reached += (*part.__bases__, type(part))
        for name, member in vars(part).items():
            if name in self._names or (_is_called_unnamed(name) and isinstance(member, FunctionType)):
                self._reached.append(member)
            elif type(member) not in PLAIN:
                self._unnamed.setdefault(name, []).append(member)

    def _save_content(self, container: Any) -> None:
        saved = SavedContent(container)
        self._saved.append(saved)
        self._reached += saved.parts

    def _save_attribute(self, owner: Any, name: str) -> None:
        saved = SavedAttribute(owner, name)
        self._saved.append(saved)
        self._reached.append(saved.before)

    def _note_names(self, names: frozenset[str]) -> None:
        """Reach the members of classes that have these names."""
        for name in names - self._names:
            self._reached += self._unnamed.pop(name, ())
        self._names |= names


def _is_called_unnamed(name: str) -> bool:
    return name.startswith("__") and name not in _UNCALLED


def _skip(state: HostState, part: Any) -> None:
    """Leave out what the host cannot change."""


_VISITS: dict[tuple[type, ...], Callable[[HostState, Any], None]] = {
    (ModuleType, *PLAIN): _skip,
    (FunctionType,): HostState.visit_function,
    (type,): HostState.visit_class,
    SavedContent.KINDS: HostState.visit_container,
    _WRAPPERS: HostState.visit_wrapper,
    (_CACHED,): HostState.visit_cached,
    (CellType,): HostState.visit_cell,
    (Tensor,): HostState.visit_tensor,
    (weakref.ref,): HostState.visit_weak,
    _HOLDERS: HostState.visit_holder,
}


@cache
def _visit(kind: type) -> Callable[[HostState, Any], None]:
    found = next((visit for kinds, visit in _VISITS.items() if issubclass(kind, kinds)), None)
    return found or (_skip if is_foreign(kind.__module__) else HostState.visit_holder)


@cache
def _slots(kind: type) -> tuple[str, ...]:
    """Return the attributes of a class's objects that no dictionary holds."""
    members = [
        member for base in kind.__mro__ if not is_foreign(base.__module__) for member in vars(base).items()
    ]
    return tuple(name for name, member in members if isinstance(member, MemberDescriptorType))
