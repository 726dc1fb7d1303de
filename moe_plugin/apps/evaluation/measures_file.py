"""The file of an evaluation's measures, in the run's folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_plugin.apps.evaluation.stored_run import run_folder
from moe_plugin.errors import ConfigError


def measures_file(checkpoint: Path) -> Path:
    """Return where the measures of a checkpoint go.

    Raises:
        ConfigError: The place is taken by something else than a file, or the folder cannot be written.
    """
    target = run_folder(checkpoint) / f"eval_{checkpoint.stem}.json"
    if target.is_symlink() or (target.exists() and not target.is_file()):
        fix = "Move it away: what it leads to may be outside of the run."
        raise ConfigError("ckpt_path", f"must leave {target} free for the measures", str(checkpoint), fix)
    if not os.access(target.parent, os.W_OK | os.X_OK):
        fix = "Copy the run to a folder of yours."
        raise ConfigError("ckpt_path", "must be in a run's folder that can be written", str(checkpoint), fix)
    return target


def write_measures(measures: Mapping[str, Any], target: Path) -> None:
    """Write measures as JSON, in one move, which also replaces a link rather than write where it leads.

    Args:
        measures: Numbers, and mappings and lists of them.
        target: The file.
    """
    from moe_plugin.apps.report.atomic_write import write_atomically  # with torch: too slow for a refusal

    write_atomically(target, json.dumps(measures, indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """Return measures with null in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
