"""One command per folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from moe_plugin.errors import ConfigError

LOCK_FILE = ".lock"


@contextmanager
def locked(folder: Path, key: str) -> Iterator[None]:
    """Keep other commands out of a folder, and out of those just above and below it, within the block.

    Bytes are locked (`fcntl.lockf`): NFS passes such a lock on to other machines, and child processes don't inherit it.

    Args:
        folder: The folder; it is made if it is missing.
        key: The setting that names it, for errors.

    Raises:
        ConfigError: Another command works there, or the folder cannot be written.
    """
    with writable(folder, key):
        folder.mkdir(parents=True, exist_ok=True)
        file = FileIO(folder / LOCK_FILE, "a+")
    with file:
        _lock(file, folder, key)
        # A sweep locks its folder, and each of its jobs may continue as its own run.
        for other in (folder.parent / LOCK_FILE, *folder.glob(f"*/{LOCK_FILE}")):
            if os.access(other, os.W_OK):
                with FileIO(other, "r+") as near:
                    _lock(near, other.parent, key)
        with writable(folder, key):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


@contextmanager
def writable(folder: Path, key: str) -> Iterator[None]:
    """Name the setting to change if a folder cannot be written within the block.

    Args:
        folder: The folder.
        key: The setting that names it.

    Raises:
        ConfigError: The folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        rule = f"must be a folder that can be written ({error.strerror})"
        raise ConfigError(key, rule, str(folder)) from error


def _lock(file: FileIO, folder: Path, key: str) -> None:
    """Lock a file until it is closed."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().decode() or "another command"
        raise ConfigError(
            key, f"must be a folder that is not in use; {holder} uses it", str(folder)
        ) from error
    except OSError as error:  # a file system without locks
        print(f"{folder}: not locked ({error.strerror}); start no second run there", file=sys.stderr)
