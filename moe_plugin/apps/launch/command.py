"""A command line of Hydra's: checks every job first, then hands over to Hydra."""

from __future__ import annotations

import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from moe_plugin.apps.config_folder import conf_dir
from moe_plugin.apps.launch.claimed_folder import claimed_folder
from moe_plugin.apps.launch.compose import HYDRA_VERSION, compose_jobs, is_group
from moe_plugin.apps.launch.explain_config_error import one_line
from moe_plugin.apps.launch.process_environment import is_launched
from moe_plugin.apps.launch.signals import is_ending
from moe_plugin.apps.launch.sweep import reported_sweep, sweep_job
from moe_plugin.apps.one_line_parser import WRONG_USE, one_line_
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
    arguments = [quote_option(word) for word in arguments]
    args = one_line_(get_args_parser()).parse_intermixed_args(arguments)
    config_name = args.config_name or config_name
    words = [*_switches(arguments, args.overrides), *args.overrides]
    if not _is_run(args):
        _hand_over(words, task, config_name)
        return
    with one_line_errors():
        _check_switches(args)
        configs = list(_compose(args, config_name))
        check(configs)
    sweep = _is_sweep(args)
    key = "hydra.sweep.dir" if sweep else "hydra.run.dir"
    job = sweep_job(task) if sweep else one_line_errors()(task)
    reported = reported_sweep() if sweep else nullcontext()
    with one_line_errors(), claimed_folder(configs[0], key) as folder, reported:
        _hand_over([*words, folder], job, config_name)


def _hand_over(words: Sequence[str], task: Callable[[DictConfig], object], config_name: str) -> None:
    """Let Hydra read the words and run the task."""
    main = hydra.main(config_path=str(conf_dir()), config_name=config_name, version_base=HYDRA_VERSION)
    with _command_line(words):
        main(task)()


def _is_run(args: Namespace) -> bool:
    """Return whether jobs will run, rather than help or a configuration be shown."""
    return not (args.help or args.hydra_help or args.cfg or args.info or args.shell_completion)


def _is_sweep(args: Namespace) -> bool:
    """Return whether the command line asks for several jobs."""
    return _is_run(args) and (args.multirun or "hydra.mode=MULTIRUN" in args.overrides)


def _switches(arguments: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Return the words that are not overrides: Hydra wants them first, people type ``-m`` anywhere."""
    remaining = list(arguments)
    for word in overrides:
        remaining.remove(word)
    return remaining


def quote_option(word: str) -> str:
    """Put options that are numbers in quotes, as Hydra wants them: ``experts=8,16`` becomes ``experts="8","16"``."""
    group, equals, options = word.partition("=")
    if not equals or not re.fullmatch(r"\w+", group) or not is_group(group):
        return word
    return f"{group}=" + re.sub(r"(?<![^,])\d+(?![^,])", r'"\g<0>"', options)


def _check_switches(args: Namespace) -> None:
    """Check the words that are not overrides."""
    if _is_sweep(args) and is_launched():
        fix = "Each job of a sweep starts its own processes."
        raise ConfigError("-m", "must be used without torchrun", fix=fix)
    for word in ("config_path", "experimental_rerun"):
        if getattr(args, word) is not None:
            switch, fix = f"--{word.replace('_', '-')}", "--config-dir adds a folder of your own options."
            raise ConfigError(switch, "is not an option of this command", getattr(args, word), fix)
    if args.config_dir is not None and not Path(args.config_dir).is_dir():
        raise ConfigError("--config-dir", "must be a folder", args.config_dir)


def _compose(args: Namespace, config_name: str) -> Iterator[DictConfig]:
    return compose_jobs(
        args.overrides, multirun=_is_sweep(args), config_dir=args.config_dir, config_name=config_name
    )


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


@contextmanager
def _command_line(arguments: Sequence[str]) -> Iterator[None]:
    """Make the arguments those of the program within its block: Hydra reads them there."""
    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        yield
    finally:
        sys.argv = before
