"""The Python blocks of README and docs run; those that need several devices or a long time are looked up."""

from __future__ import annotations

import ast
import builtins
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.docs.pages import NAMES, PAGES, ROOT, blocks
from tests.hosts import Host

# Names that a page takes as given: the reader's own.
GIVEN = {
    "docs/rules.md": {"model": Host},
    "docs/strategies.md": {"model": Host, "data_parallel_mesh": None},
    "docs/verify.md": {"model": Host, "input_ids": None, "MY_ADAPTER": None},
}
NOT_RUN = {"docs/strategies.md", "docs/verify.md"}
WITH_CODE = [name for name, page in zip(NAMES, PAGES, strict=True) if blocks(page, "python")]


@pytest.mark.parametrize("name", WITH_CODE)
class TestPythonBlocks:
    def test_names_exist(self, name):
        tree = ast.parse("\n".join(blocks(ROOT / name, "python")))
        imported = _import(tree)
        known = _bound(tree) | set(dir(builtins)) | set(GIVEN.get(name, {}))
        loaded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert loaded - known == set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = imported.get(node.value.id)
                assert not isinstance(owner, types.ModuleType) or hasattr(owner, node.attr), ast.unparse(node)

    @pytest.mark.filterwarnings("ignore")  # of hosts: few workers, no logger, old names
    def test_blocks_run(self, name, tmp_path, monkeypatch):
        if name in NOT_RUN:
            pytest.skip("needs several devices, or takes long")
        if "transformers" in "".join(blocks(ROOT / name, "python")):
            pytest.importorskip("transformers")
            pytest.importorskip("accelerate")
        monkeypatch.chdir(tmp_path)
        if name == "docs/hugging_face.md":
            Path("elsewhere/checkpoint-500").mkdir(parents=True)
        torch.manual_seed(0)
        names = {"__name__": "page"} | {key: make() for key, make in GIVEN.get(name, {}).items()}
        for block in blocks(ROOT / name, "python"):
            exec(compile(block, name, "exec", dont_inherit=True), names)


def _import(tree: ast.Module) -> dict[str, object]:
    """Run the imports of a page, and return what they bind."""
    found: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            roots = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            for root in roots:
                if root.partition(".")[0] in ("transformers", "trl", "peft"):
                    pytest.importorskip(root.partition(".")[0])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(compile(ast.Module([node], []), "imports", "exec"), found)
    return found


def _bound(tree: ast.Module) -> set[str]:
    return {name for node in ast.walk(tree) for name in _names_bound_by(node)}


def _names_bound_by(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield from ((alias.asname or alias.name).partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id


class TestLookUp:
    def test_unknown_name_is_found(self):
        tree = ast.parse("import torch\nx = torch.nothing(y)")
        assert "y" not in _bound(tree)
        assert _import(tree)["torch"] is torch
