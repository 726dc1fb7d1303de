"""The command line: checks every job first, then hands over to Hydra."""

from __future__ import annotations

import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from moe_plugin.apps.launch.claimed_folder import claimed_folder
from moe_plugin.apps.launch.compose import HYDRA_VERSION, compose_jobs, conf_dir, is_group
from moe_plugin.apps.launch.explain_config_error import one_line
from moe_plugin.apps.launch.process_environment import is_launched
from moe_plugin.apps.launch.sweep import reported_sweep, sweep_job
from moe_plugin.errors import ConfigError, MoEPluginError, RunError

FAILED, WRONG_USE = 1, 2


def run(arguments: Sequence[str], task: Callable[[DictConfig], object]) -> None:
    """Run a task on the configuration that the arguments stand for, or on each of a sweep.

    With ``count_only=true`` only the models' sizes are printed.

    Args:
        arguments: The command line without the program's name.
        task: Takes the composed configuration; what it returns goes to the sweeper.

    Raises:
        SystemExit: With code 2 and one line on stderr when the arguments are wrong; nothing was created then. With
            code 1 when a run failed, or any job of a sweep.
    """
    arguments = [quote_option(word) for word in arguments]
    args = get_args_parser().parse_intermixed_args(arguments)
    words = [*_switches(arguments, args.overrides), *args.overrides]
    if not _is_run(args):
        _hand_over(words, task)
        return
    configs, sweep = _check_all(args), _is_sweep(args)
    if all(_is_counted(config) for config in configs):
        return
    key = "hydra.sweep.dir" if sweep else "hydra.run.dir"
    job = sweep_job(task) if sweep else one_line_errors()(task)
    reported = reported_sweep() if sweep else nullcontext()
    with one_line_errors(), claimed_folder(configs[0], key) as folder, reported:
        _hand_over([*words, folder], job)


def _hand_over(words: Sequence[str], task: Callable[[DictConfig], object]) -> None:
    """Let Hydra read the words and run the task."""
    main = hydra.main(config_path=str(conf_dir()), config_name="config", version_base=HYDRA_VERSION)
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


def _check_all(args: Namespace) -> list[DictConfig]:
    """Compose and check each job, and return their configurations; the first that is wrong ends the program."""
    with one_line_errors():
        if _is_sweep(args) and is_launched():
            fix = "Each job of a sweep starts its own processes."
            raise ConfigError("-m", "must be used without torchrun", fix=fix)
        configs = list(compose_jobs(args.overrides, multirun=_is_sweep(args), config_dir=args.config_dir))
        # Torch and Lightning are imported only now: a misspelt key is answered at once.
        from moe_plugin.apps.launch.validate_config import check, check_data

        for config in configs:
            check(config)
        for config in configs:
            check_data(config)
    return configs


def _is_counted(config: DictConfig) -> bool:
    """Print the model's size if only that is asked for, and return whether it was."""
    if config.count_only:
        from moe_plugin.apps.launch.build import build_model_on_meta
        from moe_plugin.apps.models.size import measure, print_size_table

        print_size_table(measure(build_model_on_meta(config)))
    return config.count_only


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a user's errors in its block into one line on stderr.

    Raises:
        SystemExit: With code 2 for wrong use, 1 for a run that failed.
    """
    try:
        yield
    except MoEPluginError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
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
