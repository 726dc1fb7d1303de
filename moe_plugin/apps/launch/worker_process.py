"""One process of a job that runs in several: ``python -m ...worker_process RUN_FOLDER PARENT``."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from moe_plugin.apps.launch.deadline import STOP_SIGNALS
from moe_plugin.apps.launch.end_process import end_process
from moe_plugin.apps.launch.lifeline import end_with_parent
from moe_plugin.apps.launch.rank_state import own_state
from moe_plugin.apps.launch.signals import StopSignals


def _exit_code(run_folder: Path) -> int:
    """Train, and return the exit code; the parent prints the traceback of the process that failed first."""
    try:
        with StopSignals(run_folder):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            _train(run_folder)
    except SystemExit as error:
        own_state().failed_at = time.monotonic()
        return error.code if isinstance(error.code, int) else os.EX_SOFTWARE
    except BaseException:
        own_state().failed_at = time.monotonic()
        own_state().keep_trace(traceback.format_exc())
        return os.EX_SOFTWARE
    return os.EX_OK


def _train(run_folder: Path) -> None:
    """Train as the folder's ``config.yaml`` says.

    Raises:
        SystemExit: The user's error is in ``stopped.txt``, for the parent to report: all processes have the same.
    """
    # Torch takes seconds to import: signals, and the end of the parent, are obeyed in that time too.
    from omegaconf import DictConfig, OmegaConf

    from moe_plugin.apps.launch.command import FAILED
    from moe_plugin.apps.launch.explain_config_error import one_line
    from moe_plugin.apps.launch.train_job import train
    from moe_plugin.apps.report.stopped import write_stopped
    from moe_plugin.errors import MoEPluginError

    config = OmegaConf.load(run_folder / "config.yaml")
    assert isinstance(config, DictConfig)
    try:
        train(config)
    except MoEPluginError as error:
        line = one_line(str(error))
        write_stopped(run_folder, line)
        own_state().keep_error(line)
        raise SystemExit(FAILED) from error


def main(arguments: Sequence[str]) -> NoReturn:
    """Run this process from its first to its last moment; the arguments are the run's folder and the parent."""
    end_with_parent(int(arguments[1]))
    end_process(_exit_code(Path(arguments[0])))


if __name__ == "__main__":
    main(sys.argv[1:])
