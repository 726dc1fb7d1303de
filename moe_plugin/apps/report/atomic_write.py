"""Files that are either old or new, never half written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write a file in one move, even with several writers at once; the last one wins.

    Args:
        path: The file.
        text: Its content.
    """
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8", newline=""
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # a rename may reach the disk before the content does
            os.chmod(file.name, 0o666 & ~_umask())
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
