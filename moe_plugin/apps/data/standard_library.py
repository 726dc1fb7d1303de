"""The corpus every machine has: Python's standard library and torch's C++ headers."""

from __future__ import annotations

import ast
import os
import platform
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch

from moe_plugin.apps.data.docstrings import split_docstrings
from moe_plugin.apps.data.documents import Document, read_text, sha256
from moe_plugin.errors import ConfigError
from moe_plugin.number_checks import check_integer

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_TOPICS = "pydoc_data/topics.py"
_TABLES = {
    "encodings/aliases.py",
    "html/entities.py",
    "msilib/schema.py",
    "msilib/sequence.py",
    "stringprep.py",
}
_CHARACTER_MAP = re.compile(r"^(decoding|encoding)_(table|map)\b", re.MULTILINE)
_HEADER_FOLDERS = ("ATen/core", "ATen/native", "c10", "torch/csrc", "torch/headeronly")


class StandardLibrary:
    """Four domains with no download: code, prose, tables and headers.

    - `code`: the modules' source, without docstrings.
    - `prose`: the docstrings, and the language reference of `pydoc_data/topics.py`.
    - `tables`: the character maps of `encodings` and a few modules that are one literal.
    - `headers`: torch's hand-written C++ headers (generated ones are near-copies of each other), a sample of
      files chosen by a hash of their names.

    Tests and files that are not UTF-8 are left out.
    """

    def __init__(self, header_bytes: int = 3_000_000) -> None:
        """Find the standard library.

        Args:
            header_bytes: Upper limit for the `headers` domain, in bytes; 0 leaves the domain out.

        Raises:
            ConfigError: If `header_bytes` is negative or the library's source is not there.
        """
        check_integer("header_bytes", header_bytes, least=0)
        self.header_bytes = header_bytes
        self.root = Path(sysconfig.get_paths()["stdlib"])
        if not (self.root / "ast.py").is_file():
            rule = "needs a folder with the standard library's source (is it in a zip?)"
            raise ConfigError("source", rule, str(self.root), "Use data=files.")

    def fingerprint(self) -> str:
        """Return versions and settings: installed files do not change within a version."""
        versions = f"python {platform.python_version()}, torch {torch.__version__}"
        return f"{versions}, {self.header_bytes} header bytes, {self.root}"

    def documents(self) -> Iterator[Document]:
        """Yield library modules by name, then headers by name."""
        for name, text in _texts(self.root, library_files(self.root)):
            yield from module_documents(name, text)
        yield from _headers(Path(torch.__file__).parent / "include", self.header_bytes)


def library_files(root: Path) -> list[str]:
    """Return names of the standard library's modules, relative to `root`, sorted."""
    return [
        name
        for name in _walk(root, ".py")
        if name.split("/")[0].removesuffix(".py") in sys.stdlib_module_names
    ]


def module_documents(name: str, text: str) -> Iterator[Document]:
    """Yield one module's documents: a table, topics, or code with its prose.

    Args:
        name: File below the library's folder.
        text: What it holds.
    """
    if name == _TOPICS:
        yield Document(name, "prose", _topics(text))
    elif name in _TABLES or (name.startswith("encodings/") and _CHARACTER_MAP.search(text)):
        yield Document(name, "tables", text)
    else:
        code, prose = split_docstrings(text)
        yield Document(name, "code", code)
        yield Document(name, "prose", prose)


def _topics(text: str) -> str:
    """Return the texts of the dictionary that the module consists of."""
    (topics,) = [node.value for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    return "\n\n".join(ast.literal_eval(topics).values())


def _headers(include: Path, limit: int) -> Iterator[Document]:
    names = [name for folder in _HEADER_FOLDERS for name in _walk(include, ".h", folder)]
    chosen, total = [], 0
    for name, text in _texts(include, sorted(names, key=sha256)):
        if "generated" in name or "@generated" in text[:1000]:
            continue
        total += len(text.encode())
        if total > limit:
            break
        chosen.append(Document(f"torch/include/{name}", "headers", text))
    yield from sorted(chosen)


def _texts(root: Path, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        with suppress(UnicodeDecodeError):
            yield name, read_text((root / name).read_bytes())


def _walk(root: Path, suffix: str, folder: str = "") -> Iterable[str]:
    found = []
    for path, folders, files in os.walk(root / folder):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        relative = Path(path).relative_to(root)
        found += [(relative / name).as_posix() for name in files if name.endswith(suffix)]
    return sorted(found)
