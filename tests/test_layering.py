"""Hold the table of layers: imports only go down, nothing is allowed that nothing uses, and no files form a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "moe_plugin"

# What each part of the package imports of ours. Three floors: ground, plugin, apps (docs/architecture.md).
GROUND = {
    "errors": set(),
    "types": set(),
    "number_checks": {"errors"},
    "extras": {"errors"},
}
PLUGIN = {
    "routing": {"errors", "types", "number_checks"},
    "balancing": {"errors", "number_checks"},
    "metrics": {"errors"},
    "losses": {"types", "number_checks"},
    "experts": {"errors", "types", "number_checks", "routing"},
    "plots": {"errors", "extras", "metrics"},
    "checkpoints": {"errors"},
    "attach": {"errors", "types", "balancing", "metrics", "losses", "experts", "checkpoints"},
    "sharding": {"errors", "attach", "experts"},
    "callbacks": {"errors", "types", "number_checks", "balancing", "metrics", "losses", "attach", "plots"},
    "__init__": {"balancing", "attach", "sharding", "checkpoints", "callbacks"},
}
APPS = {
    "apps": set(),
    "apps.config_folder": set(),
    "apps.command_parser": {"errors", "extras", "__init__", "apps.received"},
    "apps.outputs": {"errors"},
    "apps.received": {"errors", "apps.config_folder"},
    "apps.data": {"errors", "extras", "number_checks", "checkpoints"},
    "apps.models": {
        *("errors", "extras", "types", "number_checks", "routing", "losses", "experts", "attach", "sharding"),
    },
    "apps.report": {
        *("errors", "extras", "metrics", "plots", "callbacks", "__init__"),
        *("apps.command_parser", "apps.outputs", "apps.received"),
    },
    "apps.launch": {
        *("errors", "extras", "number_checks", "experts", "attach", "sharding", "callbacks", "checkpoints"),
        *("apps.models", "apps.command_parser", "apps.outputs", "apps.report", "apps.config_folder"),
        "apps.received",
    },
    "apps.throughput": {"errors", "number_checks", "apps.data", "apps.models"},
    "apps.train": {"apps.launch"},
    "apps.evaluation": {"errors", "apps.config_folder", "apps.received", "apps.launch"},
    "apps.evaluate": {
        *("errors", "apps.received", "apps.evaluation", "apps.report", "apps.launch", "apps.throughput"),
    },
    "apps.inspection": {
        *("errors", "attach", "checkpoints", "apps.command_parser", "apps.received", "apps.launch"),
    },
    "apps.plan": {
        *("errors", "types", "number_checks", "routing", "balancing", "experts", "attach", "sharding"),
        *("apps.config_folder", "apps.launch", "apps.models", "apps.outputs"),
    },
    "apps.simulate": {
        *("errors", "extras", "number_checks", "routing", "balancing", "metrics", "plots", "apps.launch"),
    },
    "apps.study": {
        *("errors", "extras", "number_checks", "metrics", "attach", "plots", "checkpoints"),
        *("apps.data", "apps.models", "apps.command_parser", "apps.outputs", "apps.received", "apps.report"),
        *("apps.config_folder", "apps.launch", "apps.train"),
    },
}
MAY_IMPORT = GROUND | PLUGIN | APPS

HYDRA = {"hydra", "omegaconf"}
MAY_NOT_IMPORT_FROM_OUTSIDE: dict[str, set[str]] = {
    **{
        part: HYDRA | {"lightning", "pytorch_lightning", "transformers", "matplotlib"}
        for part in (GROUND.keys() | PLUGIN.keys()) - {"plots", "callbacks", "checkpoints", "__init__"}
    },
    "plots": HYDRA | {"lightning", "transformers"},
    "callbacks": HYDRA | {"transformers"},
    "checkpoints": HYDRA | {"transformers", "matplotlib"},
}
# Files that are imported by the user of that framework only.
FOR_USERS_OF = {
    "callbacks/hugging_face.py": {"transformers"},
    "callbacks/hugging_face_attachment.py": {"transformers"},
}
HEAVY = ("hydra", "omegaconf", "transformers", "matplotlib", "tensorboard", "datasets")
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """Return the dotted name of a file below the package; a folder's own is that of the folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """Return the layer of a module: its first name, in the apps its first two."""
    names = module.split(".")
    return ".".join(names[: 2 if names[0] == "apps" else 1])


@cache
def imports_of(path: Path) -> tuple[tuple[int, str, int], ...]:
    """Return (line, dotted module, level of a relative import) of every import of a file, wherever it stands."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[tuple[int, str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module or ''}.{alias.name}"
                is_module = name.startswith("moe_plugin.") and _exists(name)
                yield node.lineno, name if is_module else node.module or "", node.level


def _exists(name: str) -> bool:
    path = PACKAGE.parent / Path(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def ours(path: Path) -> list[tuple[int, str]]:
    """Return (line, module below the package) of every import of ours."""
    found = [(line, name) for line, name, _ in imports_of(path) if name.split(".")[0] == "moe_plugin"]
    return [(line, name.partition(".")[2] or "__init__") for line, name in found]


@pytest.mark.parametrize("path", FILES, ids=[str(f.relative_to(PACKAGE)) for f in FILES])
class TestFile:
    def test_no_relative_import(self, path: Path) -> None:
        assert [(line, name) for line, name, level in imports_of(path) if level] == []

    def test_imports_of_ours_go_down(self, path: Path) -> None:
        part = part_of(module_of(path))
        allowed = {part} | MAY_IMPORT[part]
        assert [(line, name) for line, name in ours(path) if part_of(name) not in allowed] == []

    def test_imports_from_outside_are_allowed(self, path: Path) -> None:
        banned = MAY_NOT_IMPORT_FROM_OUTSIDE.get(part_of(module_of(path)), set())
        banned = banned - FOR_USERS_OF.get(path.relative_to(PACKAGE).as_posix(), set())
        assert [(line, name) for line, name, _ in imports_of(path) if name.split(".")[0] in banned] == []


class TestTable:
    @pytest.mark.parametrize("part", MAY_IMPORT)
    def test_every_allowance_is_used(self, part: str) -> None:
        used = {part_of(name) for path in FILES if part_of(module_of(path)) == part for _, name in ours(path)}
        assert used - {part} == MAY_IMPORT[part]

    def test_layers_form_no_circle(self) -> None:
        TopologicalSorter(MAY_IMPORT).prepare()

    def test_files_form_no_circle_even_for_types(self) -> None:
        """A package's own file hands names on, so who imports one of its modules does not wait for it."""
        modules = {module_of(path): path for path in FILES}
        graph = {name: {to for _, to in ours(path) if to in modules} for name, path in modules.items()}
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            pytest.fail(" -> ".join(error.args[1]))


class TestTriton:
    def test_only_files_named_after_it_import_it(self) -> None:
        importing = [
            path for path in FILES if any(name.split(".")[0] == "triton" for _, name, _ in imports_of(path))
        ]
        assert importing == sorted(PACKAGE.rglob("*_triton.py"))


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
