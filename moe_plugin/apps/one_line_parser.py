"""Command lines of `argparse` whose errors are one line, as those of all our commands are."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import NoReturn

WRONG_USE = 2


def one_line_(parser: ArgumentParser) -> ArgumentParser:
    """Let a parser report a wrong word in one line, without its usage, and return it."""

    def error(message: str) -> NoReturn:
        parser.exit(WRONG_USE, f"error: {' '.join(message.split())}. See --help.\n")

    parser.error = error  # pyright: ignore[reportAttributeAccessIssue]
    return parser
