"""What code can reach from a function: the globals it names, and those of Python modules that it uses."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dis import opmap
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

_FOREIGN = sys.stdlib_module_names | {
    *("torch", "torchgen", "functorch", "triton", "numpy"),
    *("lightning", "pytorch_lightning", "lightning_fabric"),
    *("huggingface_hub", "packaging", "psutil", "tqdm", "filelock", "yaml"),
}
"""Packages that hold no state of a host."""
_OURS = ("moe_plugin.attach.", "moe_plugin.balancing.", "moe_plugin.callbacks.")
"""Our own code that watches a host and is no part of it."""


@cache
def is_foreign(module: Any) -> bool:
    """Return whether a Python module, by its name, belongs to a package without state of a host."""
    if not isinstance(module, str) or module.startswith(_OURS):
        return True
    return module.partition(".")[0] in _FOREIGN


def reached_globals(function: FunctionType) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """Yield the globals of each Python module that a function uses, and those of their values that it names."""
    own, names = function.__globals__, names_in(function.__code__)
    if is_foreign(own.get("__name__")):
        return
    spaces, seen = [own, *_imported_by(function)], set()
    for space in spaces:  # which grows
        if id(space) not in seen and not is_foreign(space.get("__name__")):
            seen.add(id(space))
            values = [space[name] for name in names & space.keys()]
            spaces += [vars(value) for value in values if type(value) is ModuleType]
            yield space, values


def _imported_by(function: FunctionType) -> list[dict[str, Any]]:
    """Return the globals of the modules that a function imports when it runs."""
    if not _imports(function.__code__):
        return []
    package = function.__globals__.get("__package__")
    names = [f"{prefix}{name}" for name in names_in(function.__code__) for prefix in ("", f"{package}.")]
    return [vars(sys.modules[name]) for name in names if name in sys.modules]


@cache
def names_in(code: CodeType) -> frozenset[str]:
    """Return the names that code uses, those in texts included, which it may give to `getattr`."""
    texts = {text for text in code.co_consts if isinstance(text, str) and text.isidentifier()}
    return frozenset(texts).union(code.co_names, *map(names_in, _nested(code)))


@cache
def _imports(code: CodeType) -> bool:
    return opmap["IMPORT_NAME"] in code.co_code[::2] or any(map(_imports, _nested(code)))


def _nested(code: CodeType) -> list[CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, CodeType)]
