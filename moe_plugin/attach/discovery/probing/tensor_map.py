"""A mapping from tensors, by identity, that keeps none of them alive."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

from torch import Tensor

Value = TypeVar("Value")


class TensorMap(Generic[Value]):
    """Maps living tensors to values; an ``id`` alone may be that of a later tensor."""

    def __init__(self) -> None:
        """Start empty."""
        self._entries: dict[int, tuple[weakref.ref[Tensor], Value]] = {}

    def __setitem__(self, tensor: Tensor, value: Value) -> None:
        """Map the tensor to a value."""
        self._entries[id(tensor)] = (weakref.ref(tensor), value)

    def __contains__(self, tensor: Tensor) -> bool:
        """Return whether the tensor has a value."""
        return self._entry(tensor) is not None

    def __getitem__(self, tensor: Tensor) -> Value:
        """Return the value of a tensor that has one."""
        return self._entries[id(tensor)][1]

    def get(self, tensor: Tensor, default: Value) -> Value:
        """Return the tensor's value.

        Args:
            tensor: Any tensor.
            default: What to return if it has none.
        """
        entry = self._entry(tensor)
        return default if entry is None else entry[1]

    def _entry(self, tensor: Tensor) -> tuple[weakref.ref[Tensor], Value] | None:
        entry = self._entries.get(id(tensor))
        return entry if entry is not None and entry[0]() is tensor else None
