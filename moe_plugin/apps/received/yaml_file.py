"""Reads YAML that cannot grow: a few nested aliases would expand to billions of values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe_plugin.apps.received.regular_file import read_text
from moe_plugin.errors import ConfigError

DEEPEST = 50
"""The deepest nesting; a run's configuration has six levels."""


def read_yaml(path: Path, key: str) -> Any:
    """Return the plain values in a YAML file.

    Args:
        path: The file.
        key: The setting that names it, for the error.

    Raises:
        ConfigError: It cannot be read, is no YAML, has aliases or tags of Python, or is nested too deeply.
    """
    with _named(path, key):
        return yaml.safe_load(_checked_text(path, key))


def read_config(path: Path, key: str) -> dict[Any, Any]:
    """Return the mapping in a YAML file, read like Hydra's: ``1e-3`` is a number; see `read_yaml` for the arguments.

    Interpolations are left as they are.

    Raises:
        ConfigError: It cannot be read, see `read_yaml`, or is no mapping.
    """
    with _named(path, key):
        values = OmegaConf.to_container(OmegaConf.create(_checked_text(path, key)))
    if not isinstance(values, dict):
        raise ConfigError(key, "must be YAML with names and values", str(path))
    return values


def _checked_text(path: Path, key: str) -> str:
    """Return a file's text once nothing in it can grow."""
    text, depth = read_text(path, key), 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
            rule = f"must have no YAML aliases and at most {DEEPEST} levels"
            raise ConfigError(key, f"{rule} (line {event.start_mark.line + 1})", str(path))
    return text


@contextmanager
def _named(path: Path, key: str) -> Iterator[None]:
    """Turn whatever YAML raises into an error that names the file, without its content."""
    try:
        yield
    except ConfigError:
        raise
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1})" if mark else ""
        raise ConfigError(key, f"must be plain YAML{place}", str(path)) from error
