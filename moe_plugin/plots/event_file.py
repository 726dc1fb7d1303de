"""Checks TensorBoard's event files, whose reader stops at the first damaged record without a word."""

from __future__ import annotations

import struct
from pathlib import Path

from moe_plugin.errors import ConfigError

_HEADER, _CHECKSUM = struct.Struct("<QI"), struct.Struct("<I")


def count_events(path: Path) -> int:
    """Return how many whole records a file has; the last may be cut off, as a run that was killed leaves it.

    Args:
        path: The file.

    Raises:
        ConfigError: A record is damaged.
    """
    # In Python, but the same as what reads the events next.
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    number, left = 0, path.stat().st_size
    with path.open("rb") as file:
        while (left := left - _HEADER.size) >= 0:
            header = file.read(_HEADER.size)
            length, checksum = _HEADER.unpack(header)
            is_whole = masked_crc32c(header[:8]) == checksum
            if is_whole and (left := left - length - _CHECKSUM.size) < 0:
                break
            if not is_whole or masked_crc32c(file.read(length)) != _CHECKSUM.unpack(file.read(4))[0]:
                raise ConfigError(
                    "RUN", f"must have whole events (record {number + 1} is damaged)", str(path)
                )
            number += 1
    return number
