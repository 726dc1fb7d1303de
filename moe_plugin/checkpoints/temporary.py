"""Names what is being written: next to its target, under a lock that ends with its process, however that ends."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

SUFFIX, FOLDER_SUFFIX = ".unfinished", ".unfinished.d"


@contextmanager
def temporary_file(target: Path) -> Iterator[FileIO]:
    """Open a new file in the target's folder, and remove it unless the block renames it.

    What processes that are dead left in the folder is removed first.
    """
    remove_leftovers(target.parent)
    with _locked(target) as file:
        try:
            yield file
        except OSError as error:
            if error.errno is not None:  # of the system: the target is the file that the user knows
                error.filename = str(target)
            raise
        finally:
            Path(file.name).unlink(missing_ok=True)


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Name a folder next to the target, and remove it unless the block renames it; see `temporary_file`."""
    with temporary_file(target) as lock:
        folder = Path(lock.name).with_suffix(FOLDER_SUFFIX)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def unused_name(target: Path) -> Path:
    """Return the name of a folder next to the target that is a leftover from the start."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}{FOLDER_SUFFIX}")


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that are dead were writing in a folder, and nothing of one that is alive."""
    for path in folder.glob(f".*{SUFFIX}"):
        # An error: it is locked, renamed in the meantime, or on a file system without locks.
        with suppress(OSError), path.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    for path in folder.glob(f".*{FOLDER_SUFFIX}"):
        if not path.with_suffix("").exists():
            shutil.rmtree(path, ignore_errors=True)


def write(file: FileIO, data: bytes) -> int:
    """Write all of the data, which the system may take in parts, and return how much that is.

    Args:
        file: A file without a buffer.
        data: Any number of bytes.
    """
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
    return len(data)


def sync_path(path: Path) -> None:
    """Wait until the disk has a file's content, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _locked(target: Path) -> FileIO:
    """Return a new file under a lock; whoever looks for leftovers may take it before the lock, so try again."""
    while True:
        file = target.with_name(f".{target.name}.{secrets.token_hex(4)}{SUFFIX}").open("xb", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            return file  # without locks, leftovers stay
        if os.path.exists(file.name):
            return file
        file.close()
