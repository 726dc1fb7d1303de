"""Jobs of a sweep: if one fails, the others still run; ``sweep_summary.csv`` has a line for each."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from moe_plugin.apps.launch.explain_config_error import one_line
from moe_plugin.apps.received.printable import printable
from moe_plugin.errors import MoEPluginError


class SweepSummary(Callback):
    """A Hydra callback that gathers the jobs' summaries after each job.

    Attributes:
        folders: Folders of the sweeps that this program has begun; Hydra itself makes and keeps the callback.
    """

    folders: ClassVar[list[Path]] = []

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note the folder, which is dated when it is first asked for."""
        self.folders.append(Path(config.hydra.sweep.dir))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Write the table again."""
        if config.hydra.mode is not RunMode.MULTIRUN:
            return
        from moe_plugin.apps.report.stopped import write_stopped
        from moe_plugin.apps.report.sweep import write_sweep_summary

        if job_return.status is JobStatus.FAILED:
            error = job_return._return_value
            write_stopped(Path(config.hydra.runtime.output_dir), f"failed: {one_line(repr(error))}")
        write_sweep_summary(Path(config.hydra.sweep.dir))


def sweep_job(task: Callable[[DictConfig], object]) -> Callable[[DictConfig], object]:
    """Return the task for a sweep: a user's error becomes one line, also in the job's folder, and no result."""

    @functools.wraps(task)
    def job(config: DictConfig) -> object:
        try:
            return task(config)
        except MoEPluginError as error:
            from moe_plugin.apps.report.stopped import write_stopped

            hydra = HydraConfig.get()
            line = one_line(str(error))
            print(f"error in job {hydra.job.num}: {line}", file=sys.stderr)
            write_stopped(Path(hydra.runtime.output_dir), f"failed: {line}")
            return None

    return job


@contextmanager
def reported_sweep() -> Iterator[None]:
    """Show the jobs' table at the end of a sweep.

    Raises:
        SystemExit: With code 1 if a job failed.
    """
    try:
        yield
    finally:
        failed = [
            row for folder in SweepSummary.folders for row in _show(folder) if row["status"] != "finished"
        ]
        SweepSummary.folders.clear()
    if failed:
        jobs = ", ".join(row["job"] for row in failed)
        print(f"error: {len(failed)} of the sweep's jobs failed: {printable(jobs)}.", file=sys.stderr)
        raise SystemExit(1)


def _show(folder: Path) -> list[dict[str, Any]]:
    """Print the table of a sweep and return its rows."""
    from rich.console import Console

    from moe_plugin.apps.report.sweep import gather_sweep, sweep_table

    rows = gather_sweep(folder)
    if rows:
        Console().print(sweep_table(folder))
    return rows
