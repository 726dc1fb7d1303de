"""Splits a Python module into its code and the prose of its docstrings."""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Iterator
from typing import NamedTuple

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class _Cut(NamedTuple):
    start: int
    end: int
    replacement: bytes


def split_docstrings(source: str) -> tuple[str, str]:
    """Take the docstrings out of a module: no text is in both domains.

    Args:
        source: Python source with LF newlines.

    Returns:
        The code without docstrings (still valid Python: a body that was only a docstring becomes `...`), and
        the docstrings, dedented, separated by a blank line. Source that does not parse is all code.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(source)
    except SyntaxError:
        return source, ""
    encoded = source.encode()
    starts = _line_starts(encoded)
    code, position, prose = [], 0, []
    for node in _documented(tree):
        prose.append(inspect.cleandoc(_docstring(node)))
        cut = _cut(node, encoded, starts)
        code += [encoded[position : cut.start], cut.replacement]
        position = cut.end
    code.append(encoded[position:])
    return b"".join(code).decode(), "\n\n".join(prose)


def _documented(node: ast.AST) -> Iterator[_Documented]:
    """Yield the nodes that have a docstring, in the order of the source; expressions are not visited."""
    if isinstance(node, _Documented) and _is_string(node.body):
        yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _documented(child)


def _is_string(body: list[ast.stmt]) -> bool:
    first = body[0] if body else None
    return (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    )


def _docstring(node: _Documented) -> str:
    return ast.get_docstring(node, clean=False) or ""


def _line_starts(encoded: bytes) -> list[int]:
    starts = [0]
    for line in encoded.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    return starts


def _cut(node: _Documented, encoded: bytes, starts: list[int]) -> _Cut:
    """Return whole lines when the docstring stands alone and is not the only statement, else just the string."""
    string = node.body[0]
    assert string.end_lineno is not None
    assert string.end_col_offset is not None
    start = starts[string.lineno - 1] + string.col_offset
    end = starts[string.end_lineno - 1] + string.end_col_offset
    line, next_line = starts[string.lineno - 1], min(starts[string.end_lineno], len(encoded))
    alone = not encoded[line:start].strip() and not encoded[end:next_line].strip()
    needed = len(node.body) == 1 and not isinstance(node, ast.Module)
    if alone and not needed:
        return _Cut(line, next_line, b"")
    return _Cut(start, end, b"...")
