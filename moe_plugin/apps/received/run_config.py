"""Reads a run's ``config.yaml`` that somebody may have sent: nothing that it names is imported, called or looked up."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from moe_plugin.apps.received.allowed_targets import is_allowed
from moe_plugin.apps.received.yaml_file import read_config
from moe_plugin.errors import ConfigError

_LOADERS_OWN = ("auto_map", "_implementation")
"""Parts of the names of settings by which transformers loads code from elsewhere."""


def read_run_config(
    path: Path, *, trust: str, trusted: bool = False, replaced: Collection[str] = ()
) -> DictConfig:
    """Return a run's configuration.

    Args:
        path: The file.
        trust: What to do if the file is the user's own, for the error.
        trusted: The file is the user's own: it may name and look up anything.
        replaced: The keys that the user gives another value.

    Raises:
        ConfigError: It cannot be read, or needs to be trusted; the error names the full key and the value.
    """
    values = read_config(path, path.name)
    if not trusted:
        for key, value in _leaves(values):
            if not any(f"{key}.".startswith(f"{each}.") for each in replaced):
                _check(key, value, f"It is in {path}. {trust}")
    config = OmegaConf.create(values)
    assert isinstance(config, DictConfig)
    return config


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the full key and value of everything in nested mappings and lists that is neither."""
    if isinstance(value, (dict, list)):
        for name, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(child, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _check(key: str, value: Any, fix: str) -> None:
    """Check one value of a received configuration."""
    parent, _, name = key.rpartition(".")
    if name == "_target_" and not is_allowed(value, parent):
        rule = "names nothing that a received configuration may make"
    elif "${" in str(value):
        rule = "must be plain in a received configuration: nothing is looked up for it"
    elif "://" in str(value):
        rule = "must be local in a received configuration"
    elif "_args_" in key.split(".") or any(part in name for part in _LOADERS_OWN):
        rule = "must not be in a received configuration"
    else:
        return
    raise ConfigError(key, rule, value, fix)
