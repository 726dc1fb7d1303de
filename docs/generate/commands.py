"""The reference of the command line: what ``--help`` of each command prints."""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stdout, suppress
from importlib import import_module
from unittest.mock import patch

COMMANDS = {
    "moe-train": "moe_plugin.apps.train",
    "moe-eval": "moe_plugin.apps.evaluate",
    "moe-inspect": "moe_plugin.apps.inspection.__main__",
    "moe-report": "moe_plugin.apps.report.__main__",
    "moe-plan": "moe_plugin.apps.plan.command",
    "moe-simulate": "moe_plugin.apps.simulate.__main__",
    "moe-study": "moe_plugin.apps.study.__main__",
}
INTRODUCTION = """# Commands

Made by `make reference`: what each command prints with `--help`. Every key of the configuration is in
[Configuration](config.md).
"""
KEYS = "Every key of the configuration"
"""Where the help of a Hydra command begins to print its configuration."""


def commands_page() -> str:
    """Return the help of all commands."""
    return INTRODUCTION + "".join(f"\n## {name}\n\n```text\n{help_of(name)}\n```\n" for name in COMMANDS)


def help_of(command: str) -> str:
    """Return what a command prints with ``--help``, without the list of all keys."""
    printed = io.StringIO()
    width = {"COLUMNS": "100", "NO_COLOR": "1"}
    with (
        patch.dict(os.environ, width),
        patch.object(sys, "argv", [command]),
        redirect_stdout(printed),
        suppress(SystemExit),
    ):
        import_module(COMMANDS[command]).main(["--help"])
    lines = printed.getvalue().partition(KEYS)[0].strip().splitlines()
    return "\n".join(line.rstrip() for line in lines)
