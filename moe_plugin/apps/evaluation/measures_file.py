"""The file of an evaluation's measures, in the run's folder."""

from __future__ import annotations

import os
from pathlib import Path

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
