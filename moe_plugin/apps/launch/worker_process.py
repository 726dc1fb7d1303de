"""One process of a job that runs in several: ``python -m moe_plugin.apps.launch.worker_process RUN_FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from moe_plugin.apps.launch.command import FAILED
from moe_plugin.apps.launch.error_report import report_error
from moe_plugin.apps.launch.explain_config_error import one_line
from moe_plugin.apps.launch.train_job import train
from moe_plugin.apps.report.stopped import write_stopped
from moe_plugin.errors import MoEPluginError


def main(run_folder: Path) -> None:
    """Train as the folder's ``config.yaml`` says.

    Raises:
        SystemExit: The user's error is in ``stopped.txt``, for the parent to report: all processes have the same.
    """
    config = OmegaConf.load(run_folder / "config.yaml")
    assert isinstance(config, DictConfig)
    try:
        train(config)
    except MoEPluginError as error:
        line = one_line(str(error))
        write_stopped(run_folder, line)
        report_error(line)
        raise SystemExit(FAILED) from error


if __name__ == "__main__":
    main(Path(sys.argv[1]))
