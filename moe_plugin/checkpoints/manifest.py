"""Keeps the SHA-256 of a checkpoint's files next to them, in lines that ``sha256sum -c`` reads too."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moe_plugin.checkpoints.temporary import sync_path, temporary_file, write
from moe_plugin.errors import CheckpointError

SUFFIX, IN_FOLDER = ".sha256", "SHA256SUMS"
_LINE = re.compile(r"(?P<sum>[0-9a-f]{64})  (?P<name>.+)")
_READ_BY_TORCH = re.compile(r".*\.distcp|\.metadata|meta\.pt")

Sums = Sequence[tuple[str, str]]
"""Pairs of a file's name and its SHA-256; a name can come twice, then either is right."""


def manifest_of(path: Path) -> Path:
    """Return where the sums of a checkpoint are: next to a file, inside a folder."""
    return path / IN_FOLDER if path.is_dir() else path.with_name(path.name + SUFFIX)


def file_sum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    sha = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(2**20):
            sha.update(block)
    return sha.hexdigest()


def write_sums(path: Path, sums: Sums) -> None:
    """Write down the sums of a checkpoint.

    Args:
        path: The checkpoint.
        sums: Those of its files.
    """
    target = manifest_of(path)
    lines = [f"{sum_}  {name if path.is_dir() else path.name}\n" for name, sum_ in sums]
    with temporary_file(target) as file:
        write(file, "".join(lines).encode())
        os.fsync(file.fileno())
        os.replace(file.name, target)
    sync_path(target.parent)


def read_sums(path: Path) -> Sums:
    """Return the sums that were written down for a checkpoint; none if there are none.

    Raises:
        CheckpointError: The file with the sums is damaged.
    """
    manifest = manifest_of(path)
    if not manifest.exists():
        return []
    try:
        lines = [_LINE.fullmatch(line) for line in manifest.read_text().splitlines()]
    except (OSError, UnicodeDecodeError):
        lines = []
    sums = [(line["name"], line["sum"]) for line in lines if line]
    if not lines or len(sums) < len(lines):
        raise CheckpointError(
            f"{str(manifest)!r} is damaged, so {path.name!r} cannot be verified."
            " To use that all the same, delete the former."
        )
    return sums if path.is_dir() else [(path.name, sum_) for _, sum_ in sums]  # a copy may have another name


def verify(path: Path, rank: int = 0, ranks: int = 1) -> bool:
    """Compare a checkpoint's files with the sums that were written down when it was saved.

    Args:
        path: The checkpoint, a file or a folder.
        rank: Which share of the files to read.
        ranks: Number of shares.

    Returns:
        Whether there are sums; those of other programs have none.

    Raises:
        CheckpointError: A file is damaged or missing; it names the file.
    """
    path = path.resolve()
    sums = read_sums(path)
    if sums and path.is_dir():
        _check_listed(path, {name for name, _ in sums})
    folder = path if path.is_dir() else path.parent
    names = sorted({name for name, _ in sums})[rank::ranks]
    with ThreadPoolExecutor() as pool:
        for name, found in zip(names, pool.map(_found, (folder / name for name in names)), strict=True):
            if (name, found) not in sums:
                raise CheckpointError(_told(folder / name, manifest_of(path)))
    return bool(sums)


def _found(file: Path) -> str:
    try:
        return file_sum(file) if file.is_file() else ""
    except OSError:
        return ""


def _check_listed(folder: Path, names: Iterable[str]) -> None:
    """Check that there is a sum for each file of a folder that torch or Lightning reads."""
    for file in sorted(folder.iterdir()):
        if file.name not in names and _READ_BY_TORCH.fullmatch(file.name):
            raise CheckpointError(f"{str(file)!r} is not listed in {IN_FOLDER}: one of the two is damaged.")


def _told(file: Path, manifest: Path) -> str:
    if not file.is_file():
        return f"{str(file)!r} is missing, but listed in {str(manifest)!r}."
    return (
        f"{str(file)!r} is damaged: its SHA-256 is not the one in {str(manifest)!r}."
        " If you replaced the file on purpose, delete the latter."
    )
