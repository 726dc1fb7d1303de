"""Keeps a sweep's ``sweep_summary.csv`` up to date: one line per finished job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig


class SweepSummary(Callback):
    """A Hydra callback that gathers the jobs' summaries after each job."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Writes the table anew."""
        if config.hydra.mode is RunMode.MULTIRUN:
            from moe_plugin.report.sweep import write_sweep_summary

            write_sweep_summary(Path(config.hydra.sweep.dir))
