"""Holds the table of layers: imports only go down, and ``import moe_plugin`` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "moe_plugin"

PURE = {"errors", "types", "check"}
TENSORS = {"routing", "balancing", "metrics", "losses"}
ATTACHED = {
    "experts",
    "kernels",
    "adapters",
    "balance",
    "balanced",
    "site_group",
    "frozen",
    "sidecar",
    "warm_start",
    "export",
    "sharding",
}
CALLBACKS = PURE | TENSORS | ATTACHED | {"plots", "callbacks"}

# What each part of the package may import of ours; a part that is not here may import everything.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "types": set(),
    "check": {"errors"},
    **{part: PURE for part in TENSORS},
    "kernels": PURE | {"routing"},
    "experts": PURE | {"routing", "kernels"},
    "adapters": PURE | {"routing", "balancing", "experts", "kernels"},
    "sidecar": set(),
    "frozen": PURE | {"adapters"},
    "balance": PURE | {"routing", "balancing", "adapters", "frozen", "balanced"},
    "balanced": PURE | {"balancing", "adapters", "site_group", "sidecar", "warm_start", "export", "sharding"},
    "site_group": PURE | {"balancing", "adapters"},
    "warm_start": PURE | {"balancing", "adapters", "metrics"},
    "export": PURE | {"adapters", "sidecar"},
    "sharding": PURE | {"adapters", "experts"},
    "plots": PURE | {"metrics"},
    "callbacks": CALLBACKS,
    "__init__": CALLBACKS - {"plots"},
}
APPLICATION = {
    *("models", "data", "train", "evaluate", "report", "launch", "study", "conf", "inspection", "plan"),
    "simulate",
}

NO_FRAMEWORK = {"lightning", "pytorch_lightning", "hydra", "omegaconf", "transformers", "matplotlib"}
MAY_NOT_IMPORT_FROM_OUTSIDE: dict[str, set[str]] = {
    **{part: NO_FRAMEWORK for part in PURE | TENSORS | ATTACHED},
    "plots": {"lightning", "hydra", "omegaconf", "transformers"},
    "callbacks": {"hydra", "omegaconf", "transformers"},
}
# Files that are imported by the user of that framework only.
FOR_USERS_OF = {"callbacks/hugging_face.py": {"transformers"}}
HEAVY = ("hydra", "omegaconf", "transformers", "matplotlib", "tensorboard", "datasets")


def part_of(path: Path) -> str:
    """Returns the part of the package that a file belongs to: its first folder, or its own name."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> Iterator[tuple[int, str, int]]:
    """Yields (line, dotted module, level of a relative import) of every import of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else []
            if node.module == "moe_plugin":
                names = [f"moe_plugin.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name or "", node.level) for name in names or [""])


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(f.relative_to(PACKAGE)) for f in FILES])
class TestLayers:
    def test_no_relative_import(self, path: Path) -> None:
        assert [(line, name) for line, name, level in imports_of(path) if level] == []

    def test_imports_of_ours_go_down(self, path: Path) -> None:
        part = part_of(path)
        if part not in MAY_IMPORT:
            assert part in APPLICATION, f"{part} is in no layer: add it to the table of layers"
            return
        ours = [
            (line, name.split(".")[1]) for line, name, _ in imports_of(path) if name.startswith("moe_plugin.")
        ]
        assert [(line, to) for line, to in ours if to != part and to not in MAY_IMPORT[part]] == []

    def test_imports_from_outside_are_allowed(self, path: Path) -> None:
        banned = MAY_NOT_IMPORT_FROM_OUTSIDE.get(part_of(path), set())
        banned = banned - FOR_USERS_OF.get(path.relative_to(PACKAGE).as_posix(), set())
        assert [(line, name) for line, name, _ in imports_of(path) if name.split(".")[0] in banned] == []


class TestTriton:
    def test_only_files_named_after_it_import_it(self) -> None:
        importing = [
            path for path in FILES if any(name.split(".")[0] == "triton" for _, name, _ in imports_of(path))
        ]
        assert importing == sorted(PACKAGE.glob("kernels/*_triton.py"))


class TestImport:
    def test_package_needs_torch_and_lightning_only(self) -> None:
        """Lightning's loggers import tensorboard's writer if it is there, so compare with lightning alone."""
        loaded = {name: self.heavy_after(f"import {name}") for name in ("lightning.pytorch", "moe_plugin")}
        assert loaded["moe_plugin"] <= loaded["lightning.pytorch"]

    def test_callbacks_need_torch_and_lightning_only(self) -> None:
        baseline = self.heavy_after("import lightning.pytorch, torchmetrics")
        assert self.heavy_after("import moe_plugin.callbacks.loss_free") <= baseline

    @staticmethod
    def heavy_after(statement: str) -> set[str]:
        code = f"{statement}; import sys; print(*[m for m in {HEAVY!r} if m in sys.modules])"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
        )
        return set(done.stdout.split())
