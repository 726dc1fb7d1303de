"""The generated pages by file name, and how each is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from docs.generate.alarms import alarms_page
from docs.generate.api import api_page
from docs.generate.commands import commands_page
from docs.generate.config import config_page

REFERENCE = Path(__file__).parents[1] / "reference"
PAGES: Mapping[str, Callable[[], str]] = {
    "alarms.md": alarms_page,
    "api.md": api_page,
    "commands.md": commands_page,
    "config.md": config_page,
}
