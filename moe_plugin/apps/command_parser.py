"""The command-line parser that our commands share: errors in one line, `--version` and `--completion`."""

from __future__ import annotations

from argparse import Action, ArgumentParser, Namespace
from pathlib import Path
from typing import Any, NoReturn

from moe_plugin import __version__
from moe_plugin.apps.received.printable import printable
from moe_plugin.errors import ConfigError
from moe_plugin.extras import require

WRONG_USE = 2
SHELLS = ("bash", "zsh", "fish")


class CommandParser(ArgumentParser):
    """A parser whose errors are one line, without its usage, and whose `--version` is that of moe_plugin."""

    def __init__(self, **settings: Any) -> None:
        """Take the settings of `ArgumentParser`; options that the parents have too are replaced by ours."""
        super().__init__(conflict_handler="resolve", **settings)
        version = f"moe_plugin {__version__}"
        self.add_argument("--version", action="version", version=version, help="show the version")
        self.add_argument(
            "--completion",
            choices=SHELLS,
            action=_PrintCompletion,
            help="show the script for this shell's Tab key",
        )

    def error(self, message: str) -> NoReturn:
        """End the program with one line."""
        self.exit(
            WRONG_USE, f"error: {printable(' '.join(message.split()).removesuffix('.'))}. See --help.\n"
        )


class _PrintCompletion(Action):
    """Prints what a shell evaluates to complete the command, and ends the program."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: Any = None
    ) -> None:
        try:
            require("shtab", "--completion")
        except ConfigError as error:
            parser.exit(WRONG_USE, f"error: {error}\n")
        import shtab  # pyright: ignore[reportMissingImports]

        for action in parser._actions:
            if action.type is Path or not action.option_strings:
                action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
        print(shtab.complete(parser, values))
        parser.exit()
