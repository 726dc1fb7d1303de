"""The words of a Hydra command, and what it shows instead of running: help, completion, a configuration."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from moe_plugin.apps.command_parser import SHELLS, CommandParser
from moe_plugin.apps.config_folder import conf_dir
from moe_plugin.apps.launch.command_help import help_text
from moe_plugin.apps.launch.compose import HYDRA_VERSION, compose_jobs, quote_option
from moe_plugin.errors import ConfigError


class CommandLine(NamedTuple):
    """The words of a command line, as Hydra wants them.

    Attributes:
        args: The switches.
        switches: The words of the switches.
        overrides: The ``key=value`` words.
        config_name: The file of `conf_dir` that is composed.
    """

    args: Namespace
    switches: list[str]
    overrides: list[str]
    config_name: str

    @property
    def is_run(self) -> bool:
        """Whether jobs will run, rather than help or a configuration be shown."""
        args = self.args
        return not (args.help or args.hydra_help or args.cfg or args.info or args.shell_completion)

    @property
    def is_sweep(self) -> bool:
        """Whether it stands for several jobs."""
        return self.args.multirun or "hydra.mode=MULTIRUN" in self.overrides


def read_command_line(arguments: Sequence[str], config_name: str) -> CommandLine:
    """Return the words of a command line, sorted.

    Args:
        arguments: The command line without the program's name.
        config_name: The file of `conf_dir` that is composed, unless a switch names another.

    Raises:
        SystemExit: With code 2 and one line on stderr for a wrong switch; with code 0 after ``--version``.
    """
    parser = CommandParser(parents=[get_args_parser()], add_help=False)
    parser.add_argument("--completion", choices=SHELLS)  # Hydra has a script of its own
    args = parser.parse_intermixed_args(arguments)
    if args.completion:
        install = ["--shell-completion", f"install={args.completion}"]
        return read_command_line(install, config_name)
    switches = list(arguments)
    for word in args.overrides:
        switches.remove(word)
    return CommandLine(
        args, switches, [quote_option(word) for word in args.overrides], args.config_name or config_name
    )


def refuse_switches(line: CommandLine) -> None:
    """Refuse what is not ``key=value``.

    Raises:
        ConfigError: There is a switch.
    """
    if line.switches:
        raise ConfigError(line.switches[0], "is not an option of this command")


def compose_line(line: CommandLine) -> Iterator[DictConfig]:
    """Yield the configuration of each job, see `compose_jobs`."""
    return compose_jobs(
        line.overrides, multirun=line.is_sweep, config_dir=line.args.config_dir, config_name=line.config_name
    )


def show(line: CommandLine) -> None:
    """Show what the switches of a command line that is no run ask for.

    Raises:
        ConfigError: A ``key=value`` word is wrong.
    """
    if line.args.help:
        folder = line.args.config_dir
        print(help_text(next(compose_line(line)), line.config_name, [Path(folder)] if folder else []))
        return
    if line.args.cfg or line.args.info:
        next(compose_line(line))  # a wrong word is reported in one line
    hand_over([*line.switches, *line.overrides], lambda config: None, line.config_name)


def hand_over(words: Sequence[str], task: Callable[[DictConfig], object], config_name: str) -> None:
    """Let Hydra read the words and run the task.

    Args:
        words: The switches, then the ``key=value`` words.
        task: What runs.
        config_name: The file of `conf_dir` that is composed.
    """
    main = hydra.main(config_path=str(conf_dir()), config_name=config_name, version_base=HYDRA_VERSION)
    with _command_line(words):
        main(task)()


@contextmanager
def _command_line(arguments: Sequence[str]) -> Iterator[None]:
    """Make the arguments those of the program within its block: Hydra reads them there."""
    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        yield
    finally:
        sys.argv = before
