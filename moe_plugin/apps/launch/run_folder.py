"""The run's folder at the start of a run, whether new or one in which a stopped run continues."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from moe_plugin.apps.report.stopped import STOPPED_FILE
from moe_plugin.apps.report.summary import SUMMARY_FILE


def prepare_(folder: Path, config: DictConfig) -> None:
    """Write the run's ``config.yaml``, and put aside an earlier run's results, which must not pass for this one's.

    Args:
        folder: The run's.
        config: The run's, resolved.
    """
    for name in (SUMMARY_FILE, STOPPED_FILE):
        (folder / name).unlink(missing_ok=True)
    for table in folder.glob("*/metrics.csv"):
        _keep_(table)
    OmegaConf.save(config, folder / "config.yaml")


def _keep_(table: Path) -> None:
    """Move a table out of the way, to ``metrics.1.csv`` and so on: Lightning's CSV logger starts by deleting it."""
    number = 1
    while (kept := table.with_suffix(f".{number}.csv")).exists():
        number += 1
    table.rename(kept)
