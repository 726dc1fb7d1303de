"""Hold what ruff does not know of how this package is written: sections of docstrings, and what begins with ``_``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moe_plugin"
FILES = sorted(PACKAGE.rglob("*.py"))
SEARCHED = (
    "moe_plugin",
    "tests",
    "benchmarks",
    "examples",
    "conf",
    "docs",
    "hydra_plugins",
    "pyproject.toml",
)
Function = ast.FunctionDef | ast.AsyncFunctionDef
# Of a framework, which documents their arguments.
HOOKS = re.compile(
    r"on_\w+|setup|forward|state_dict|load_state_dict|[a-z]+_step|[a-z]+_dataloader|configure_\w+|load_checkpoint"
)
# First words that begin no command; ruff's D401 knows "Returns" and its like.
NO_VERBS = {
    *(
        [
            "a",
            "an",
            "the",
            "one",
            "two",
            "three",
            "all",
            "each",
            "every",
            "those",
            "this",
            "that",
            "it",
            "its",
            "no",
            "some",
            "other",
        ]
    ),
    *(
        [
            "what",
            "whether",
            "how",
            "where",
            "which",
            "who",
            "why",
            "when",
            "if",
            "as",
            "so",
            "then",
            "from",
            "by",
            "for",
            "with",
            "in",
            "on",
            "at",
            "after",
            "among",
        ]
    ),
    *(
        [
            "bytes",
            "tokens",
            "experts",
            "scores",
            "names",
            "steps",
            "numbers",
            "gradients",
            "parameters",
            "sizes",
        ]
    ),
}
REFERENCE = re.compile(r"(see|as|than) `", re.IGNORECASE)


def functions_of(path: Path) -> Iterator[tuple[Function, bool]]:
    """Yield every public function and method of public classes, and whether it is a method."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield node, False
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            methods = [each for each in node.body if isinstance(each, Function)]
            yield from ((m, True) for m in methods if m.name == "__init__" or not m.name.startswith("_"))


def parameters_of(function: Function, is_method: bool) -> list[str]:
    given = function.args
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    is_static = any(getattr(decorator, "id", "") == "staticmethod" for decorator in function.decorator_list)
    return names[1:] if is_method and not is_static else names


def is_property(function: Function) -> bool:
    names = {getattr(d, "id", "") or getattr(d, "attr", "") for d in function.decorator_list}
    return bool(names & {"property", "cached_property", "setter"})


def raised_by(function: Function) -> set[str]:
    """Return the names of errors that a function itself raises."""
    raised = [node.exc for node in ast.walk(function) if isinstance(node, ast.Raise) and node.exc is not None]
    calls = [each.func if isinstance(each, ast.Call) else each for each in raised]
    names = {each.id for each in calls if isinstance(each, ast.Name)}
    return {name for name in names if name[0].isupper()}


def docstring_of(function: Function, path: Path) -> str:
    """Return a function's docstring; of a constructor that of its class too."""
    own = ast.get_docstring(function) or ""
    if function.name != "__init__":
        return own
    kinds = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    return "\n".join(
        [own, *(ast.get_docstring(kind) or "" for kind in kinds if function.lineno in _lines(kind))]
    )


def _lines(kind: ast.ClassDef) -> range:
    return range(kind.lineno, (kind.end_lineno or kind.lineno) + 1)


@cache
def words_elsewhere() -> dict[Path, set[str]]:
    """Return the identifiers in each file that may use the package."""
    files = [
        path for name in SEARCHED for path in ([ROOT / name] if "." in name else (ROOT / name).rglob("*.*"))
    ]
    texts = {
        path: path.read_text() for path in files if path.suffix in (".py", ".yaml", ".md", ".toml", ".html")
    }
    return {path: set(re.findall(r"\w+", text)) for path, text in texts.items()}


@pytest.mark.parametrize("path", FILES, ids=[str(f.relative_to(PACKAGE)) for f in FILES])
class TestFile:
    def test_functions_begin_with_a_verb(self, path: Path) -> None:
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, Function)]
        first = {
            (function.lineno, function.name): (ast.get_docstring(function) or "Say").split()[0]
            for function in functions
            if not is_property(function)
        }
        assert {where: word for where, word in first.items() if word.lower() in NO_VERBS} == {}

    def test_two_or_more_parameters_are_explained(self, path: Path) -> None:
        silent = []
        for function, is_method in functions_of(path):
            documented = docstring_of(function, path)
            explains = "Args:" in documented or "Attributes:" in documented or REFERENCE.search(documented)
            if len(parameters_of(function, is_method)) > 1 and not (
                HOOKS.fullmatch(function.name) or explains
            ):
                silent.append((function.lineno, function.name))
        assert silent == []

    def test_errors_raised_are_told(self, path: Path) -> None:
        silent = [
            (function.lineno, function.name, sorted(raised_by(function)))
            for function, _ in functions_of(path)
            if raised_by(function) and "Raises:" not in docstring_of(function, path)
        ]
        assert silent == []

    def test_functions_of_this_file_alone_begin_with_an_underscore(self, path: Path) -> None:
        elsewhere = set().union(*(words for other, words in words_elsewhere().items() if other != path))
        own = [node for node in ast.parse(path.read_text()).body if isinstance(node, Function)]
        assert [
            f.name for f in own if not f.name.startswith("_") and f.name not in elsewhere | {"main"}
        ] == []
