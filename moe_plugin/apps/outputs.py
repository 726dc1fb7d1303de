"""Checks that a place can be written, before the work whose results go there."""

from __future__ import annotations

import tempfile
from pathlib import Path

from moe_plugin.errors import ConfigError


def check_output_file(key: str, path: Path) -> None:
    """Check that a file can be written; its folder, and what is above it, may still be missing.

    Args:
        key: The setting that names it, for the error.
        path: The file.

    Raises:
        ConfigError: It is a folder, or no file can be made there.
    """
    reason = "It is a folder." if path.is_dir() else _obstacle(path.absolute().parent)
    if reason:
        raise ConfigError(key, "must be a file that can be written", str(path), reason)


def check_output_folder(key: str, path: Path) -> None:
    """Check that files can be written into a folder, which may still be missing; see `check_output_file`.

    Raises:
        ConfigError: It is a file, or no file can be made there.
    """
    if reason := _obstacle(path.absolute()):
        raise ConfigError(key, "must be a folder that can be written", str(path), reason)


def _obstacle(folder: Path) -> str:
    """Return why no file can be made below a folder or below the nearest one above it that exists; "" if one can."""
    try:
        there = next(each for each in (folder, *folder.parents) if each.exists())
        if not there.is_dir():
            return f"{there} is a file."
        with tempfile.TemporaryFile(dir=there):  # where the system can, it never has a name
            return ""
    except OSError as error:
        return f"{folder}: {error.strerror}."
