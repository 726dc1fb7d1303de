"""Reads files of bounded size; a pipe or a device, which could keep the reader waiting for ever, is refused."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from moe_plugin.errors import ConfigError

MEBIBYTE = 2**20


def read_text(path: Path, key: str, most: int = MEBIBYTE) -> str:
    """Return the text of a file.

    Args:
        path: The file.
        key: The setting that names it, for the error.
        most: The largest size in bytes.

    Raises:
        ConfigError: It is no regular file, is too large, or holds no UTF-8.
    """
    try:
        with open(_descriptor(path), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(key, "must be a regular file, not a folder, pipe or device", str(path))
            content = file.read(most + 1)
    except OSError as error:
        raise ConfigError(key, f"must be a file that can be read ({error.strerror})", str(path)) from error
    if len(content) > most:
        raise ConfigError(key, f"must have at most {most:,} bytes", str(path))
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(key, f"must be UTF-8 text (not at byte {error.start:,})", str(path)) from error


def _descriptor(path: Path) -> int:
    """Open a file without waiting for a pipe's writer."""
    return os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))


def read_json(path: Path, key: str, most: int = 64 * MEBIBYTE) -> dict[str, Any]:
    """Return the mapping in a JSON file; see `read_text` for the arguments.

    Raises:
        ConfigError: It cannot be read, or holds no mapping.
    """
    text = read_text(path, key, most)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of too many digits
        place = (
            f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else "too large"
        )
        raise ConfigError(key, f"must be JSON ({place})", str(path)) from error
    if not isinstance(value, dict):
        raise ConfigError(key, "must be JSON with names and values", str(path))
    return value
