"""JSON files that every reader takes: whole, and without the numbers that JSON does not have."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_plugin.apps.report.atomic_write import write_atomically


def write_json(path: Path, content: object) -> None:
    """Write a file in one move; NaN and infinity become null.

    Args:
        path: The file.
        content: Mappings, sequences, texts, numbers, True, False and None.
    """
    write_atomically(path, json.dumps(finite(content), indent=2, allow_nan=False) + "\n")


def finite(content: Any) -> Any:
    """Return content with None for each number that JSON does not have."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, Sequence) and not isinstance(content, str):
        return [finite(value) for value in content]
    return content
