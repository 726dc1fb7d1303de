"""A place to write files that are then moved into the cache folder."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from moe_plugin.errors import ConfigError

_PREFIX = ".writing-"
_LOCK = ".lock"


@contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """Yield a new folder inside the cache folder; what killed processes left there is removed first.

    Every writer holds the same lock together with the others, and it ends with its process. Who gets the lock alone
    knows that no writer lives.

    Raises:
        ConfigError: If nothing can be written there.
    """
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / _LOCK, os.O_RDONLY | os.O_CREAT, 0o666)
    try:
        _remove_leftovers(folder, lock)
        with writable(folder):
            place = tempfile.TemporaryDirectory(dir=folder, prefix=_PREFIX)
        with place as name:
            yield Path(name)
    finally:
        os.close(lock)


def _remove_leftovers(folder: Path, lock: int) -> None:
    # Without locks, as on some network file systems, leftovers stay.
    with suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in folder.glob(f"{_PREFIX}*"):
            shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_SH)


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Turn errors of writing in its block into one about the cache folder.

    Raises:
        ConfigError: If writing failed.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        fix = "Set data.cache or the variable MOE_PLUGIN_CACHE to another folder."
        raise ConfigError("data.cache", f"must be writable ({error})", str(folder), fix) from error
