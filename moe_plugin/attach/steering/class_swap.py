"""Give one module instance extra behaviour by changing its class, and take it back exactly.

A swapped class keeps its name, its ``isinstance`` relations and its attributes, is traced by ``torch.compile``
like any class, and survives deepcopy and pickle, which bound methods set on an instance do not.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn


class Mixin:
    """Base of the mixins; pickles instances of classes that no module defines."""

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Pickle as the mixins, the host's class and the instance's state."""
        mixins, base = _unmix(type(self))
        getstate = getattr(self, "__getstate__", None)
        return _rebuild, (mixins, base), getstate() if getstate else self.__dict__


def swap_(module: nn.Module, mixin: type[Mixin]) -> None:
    """Put a mixin in front of a module's class.

    Args:
        module: The instance.
        mixin: The mixin.
    """
    module.__class__ = _mixed(mixin, type(module))


def unswap_(module: nn.Module, mixin: type[Mixin]) -> None:
    """Undo `swap_`, also below later mixins; arguments as `swap_`."""
    mixins, base = _unmix(type(module))
    assert mixin in mixins, f"{type(module)} has no {mixin}"
    module.__class__ = _mixed_all(tuple(each for each in mixins if each is not mixin), base)


@cache
def _mixed(mixin: type[Mixin], base: type[nn.Module]) -> type[nn.Module]:
    same = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (mixin, base), same)


def _unmix(kind: type) -> tuple[tuple[type[Mixin], ...], type]:
    """Return the mixins of a swapped class, the first put in first, and the host's class."""
    if not issubclass(kind, Mixin):
        return (), kind
    mixins, base = _unmix(kind.__bases__[1])
    return (*mixins, kind.__bases__[0]), base


def _rebuild(mixins: tuple[type[Mixin], ...], base: type[nn.Module]) -> nn.Module:
    kind = _mixed_all(mixins, base)
    return kind.__new__(kind)


def _mixed_all(mixins: tuple[type[Mixin], ...], base: type[nn.Module]) -> type[nn.Module]:
    for mixin in mixins:
        base = _mixed(mixin, base)
    return base
