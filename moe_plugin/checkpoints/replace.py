"""Puts a finished checkpoint in the place of another, in steps after each of which there is a good one."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from moe_plugin.checkpoints.manifest import Sums, file_sum, manifest_of, read_sums, write_sums
from moe_plugin.checkpoints.safe_load import METADATA
from moe_plugin.checkpoints.sharded import LIGHTNINGS_PART
from moe_plugin.checkpoints.temporary import sync_path, unused_name
from moe_plugin.errors import CheckpointError

PREVIOUS = ".previous"
_OF_FOLDERS = (METADATA, LIGHTNINGS_PART)


def previous_of(path: Path) -> Path:
    """Return where the checkpoint is that was there before."""
    return path.with_name(path.name + PREVIOUS)


def put(new: Path, path: Path, sums: Sums) -> None:
    """Put a checkpoint where it belongs; of one called ``last...``, the one before is kept.

    Args:
        new: The checkpoint, complete on the disk.
        path: Where it belongs, in the same folder.
        sums: Those of its files.
    """
    if path.is_dir() or new.is_dir() or _is_kept(path):
        set_aside(path)
    if new.is_dir():
        write_sums(new, sums)
        discard(path)
        new.rename(path)
    else:
        # While either file may be there, both are right.
        write_sums(path, [*sums, *_sums_of_file(path)])
        new.replace(path)
        write_sums(path, sums)
    sync_path(path.parent)
    if not _is_kept(path):
        discard(previous_of(path))


def set_aside(path: Path) -> None:
    """Make what is there the previous one; a folder is no longer there then.

    Raises:
        IsADirectoryError: It is a folder with something else in it.
    """
    previous = previous_of(path)
    if not path.exists():
        return
    if path.is_dir() and any(path.iterdir()) and not any((path / name).exists() for name in _OF_FOLDERS):
        raise IsADirectoryError(errno.EISDIR, "a folder that is no checkpoint is in the way", str(path))
    discard(previous)
    if path.is_dir():
        path.rename(previous)
    else:
        write_sums(previous, _sums_of_file(path))
        try:
            os.link(path, previous)
        except OSError:  # a file system without links
            path.rename(previous)


def discard(path: Path) -> None:
    """Remove a checkpoint, if it is there, and what is written down of it."""
    if path.is_dir() and not path.is_symlink():
        path = path.rename(unused_name(path))  # half of a folder could be taken for a checkpoint
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
        manifest_of(path).unlink(missing_ok=True)


def _is_kept(path: Path) -> bool:
    """Return whether a name is one that runs save over again and again."""
    return path.name.startswith("last")


def _sums_of_file(path: Path) -> Sums:
    """Return what is right for the file that is there: of another program's, what it is now."""
    try:
        return read_sums(path) or ([(path.name, file_sum(path))] if path.is_file() else [])
    except CheckpointError:
        return []
