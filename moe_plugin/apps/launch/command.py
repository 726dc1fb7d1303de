"""A command line of Hydra's: checks every job first, then hands over to Hydra."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from omegaconf import DictConfig

from moe_plugin.apps.command_parser import WRONG_USE
from moe_plugin.apps.launch.claimed_folder import claimed_folder
from moe_plugin.apps.launch.command_line import CommandLine, compose_line, hand_over, read_command_line, show
from moe_plugin.apps.launch.explain_config_error import one_line
from moe_plugin.apps.launch.process_environment import is_launched
from moe_plugin.apps.launch.signals import is_ending
from moe_plugin.apps.launch.sweep import reported_sweep, sweep_job
from moe_plugin.errors import ConfigError, MoEPluginError, RunError

FAILED = 1


def run(
    arguments: Sequence[str],
    task: Callable[[DictConfig], object],
    *,
    config_name: str,
    check: Callable[[Sequence[DictConfig]], None],
) -> None:
    """Run a task on the configuration that the arguments stand for, or on each of a sweep, once all are checked.

    Args:
        arguments: The command line without the program's name.
        task: Takes the composed configuration; what it returns goes to the sweeper.
        config_name: The file of `conf_dir` that is composed.
        check: Raises a `ConfigError` for a wrong one of the jobs' configurations, and creates nothing.

    Raises:
        SystemExit: With code 2 and one line on stderr when the arguments are wrong; nothing was created then. With
            code 1 when a run failed, or any job of a sweep.
    """
    line = read_command_line(arguments, config_name)
    if not line.is_run:
        with one_line_errors():
            show(line)
        return
    with one_line_errors():
        _check_switches(line)
        configs = list(compose_line(line))
        check(configs)
    key = "hydra.sweep.dir" if line.is_sweep else "hydra.run.dir"
    job = sweep_job(task) if line.is_sweep else one_line_errors()(task)
    reported = reported_sweep() if line.is_sweep else nullcontext()
    with one_line_errors(), claimed_folder(configs[0], key) as folder, reported:
        hand_over([*line.switches, *line.overrides, folder], job, line.config_name)


def _check_switches(line: CommandLine) -> None:
    """Check the words that are not overrides."""
    if line.is_sweep and is_launched():
        fix = "Each job of a sweep starts its own processes."
        raise ConfigError("-m", "must be used without torchrun", fix=fix)
    for word in ("config_path", "experimental_rerun"):
        if getattr(line.args, word) is not None:
            switch, fix = f"--{word.replace('_', '-')}", "--config-dir adds a folder of your own options."
            raise ConfigError(switch, "is not an option of this command", getattr(line.args, word), fix)
    if line.args.config_dir is not None and not Path(line.args.config_dir).is_dir():
        raise ConfigError("--config-dir", "must be a folder", line.args.config_dir)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a user's errors in its block into one line on stderr.

    Raises:
        SystemExit: With code 2 for wrong use, 1 for a run that failed.
    """
    try:
        yield
    except MoEPluginError as error:
        if is_ending() or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        raise SystemExit(FAILED if isinstance(error, RunError) else WRONG_USE) from error
