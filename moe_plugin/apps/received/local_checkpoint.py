"""The checkpoint that a word of the command line names, on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from moe_plugin.errors import ConfigError


def local_checkpoint(word: object, key: str) -> Path:
    """Return the absolute path of a checkpoint: libraries take ``http:/...``, which may be a folder, for a URL.

    Args:
        word: The path.
        key: The setting that names it, for the error.

    Raises:
        ConfigError: There is no such file or folder on this machine.
    """
    if not isinstance(word, (str, Path)) or not str(word):
        raise ConfigError(key, "must be an existing checkpoint", word)
    if "://" in str(word):
        fix = "Download it, and look at where it is from: a checkpoint can hold code."
        raise ConfigError(key, "must be a checkpoint on this machine, not a URL", str(word), fix)
    path = Path(os.path.abspath(word))
    if not (path.is_file() or path.is_dir()):
        rule = "must be a file or a folder" if path.exists() else "must be an existing checkpoint"
        raise ConfigError(key, rule, str(word))
    return path
