"""Reads what a class or function takes from its source, so an argument is checked before torch is imported.

What the source does not show plainly is not known here. The check of the imported class comes later in any case.
"""

from __future__ import annotations

import ast
import collections.abc
import typing
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moe_plugin.apps.launch.signature import Parameters

_Definition = ast.ClassDef | ast.FunctionDef
_LONGEST = 5
"""Most imports that are followed from a package to the file with the definition."""


def parameters_in_source(target: str) -> Parameters | None:
    """Return what a class or function takes; None if its source does not show it.

    Args:
        target: Its full name.
    """
    module, _, name = target.rpartition(".")
    definition = _find(module, name, _LONGEST)
    if isinstance(definition, ast.FunctionDef):
        return _of_function(definition, is_method=False)
    return None if definition is None else _of_class(definition)


def _find(module: str, name: str, left: int) -> _Definition | None:
    """Return a definition, wherever a module imports it from."""
    for node in ast.walk(_parsed(module)) if left else ():
        if isinstance(node, _Definition) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _find(node.module, alias.name, left - 1)
    return None


@cache
def _parsed(module: str) -> ast.Module:
    """Return the source of a module that need not be imported; nothing if there is none."""
    root, *below = module.split(".")
    try:
        spec = find_spec(root)
    except ValueError:
        return ast.Module([], [])
    if spec is None or spec.origin is None:
        return ast.Module([], [])
    path = Path(spec.origin).parent.joinpath(*below)
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8")) if file.is_file() else ast.Module([], [])


def _of_class(definition: ast.ClassDef) -> Parameters | None:
    """Return what a class's own constructor takes, or a dataclass without bases."""
    for node in definition.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return _of_function(node, is_method=True)
    is_dataclass = any("dataclass" in ast.unparse(each) for each in definition.decorator_list)
    if not is_dataclass or definition.bases:
        return None
    annotated = (node for node in definition.body if isinstance(node, ast.AnnAssign))
    fields = [node for node in annotated if "ClassVar" not in ast.unparse(node.annotation)]
    return Parameters({ast.unparse(node.target): _hint(node.annotation) for node in fields}, takes_any=False)


def _of_function(function: ast.FunctionDef, *, is_method: bool) -> Parameters:
    given = function.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs][is_method:]
    hints = {each.arg: Any if each.annotation is None else _hint(each.annotation) for each in arguments}
    return Parameters(hints, takes_any=given.kwarg is not None)


def _hint(annotation: ast.expr) -> Any:
    """Return a type hint, `Any` in place of every name that is not Python's own."""
    try:
        return eval(compile(ast.Expression(annotation), "hint", "eval"), {}, _Names())
    except (TypeError, AttributeError, NameError):
        return Any


class _Names(dict[str, Any]):
    """The names in type hints."""

    def __missing__(self, name: str) -> Any:
        for place in (typing, collections.abc):
            if hasattr(place, name):
                return getattr(place, name)
        if name in {"bool", "int", "float", "str", "list", "dict", "tuple", "set", "object"}:
            raise KeyError(name)  # Python finds it
        return Any
