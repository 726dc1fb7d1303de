"""Explains what is wrong with a configuration: the key, the value, what is allowed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from hydra import compose
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from moe_plugin.apps.launch.overrides import parse
from moe_plugin.apps.launch.signature import unknown_key
from moe_plugin.apps.received.printable import printable
from moe_plugin.errors import ConfigError, Value
from moe_plugin.extras import require

_PLUGINS = {
    "hydra/launcher/submitit_slurm": "hydra_submitit_launcher",
    "hydra/launcher/submitit_local": "hydra_submitit_launcher",
    "hydra/launcher/joblib": "hydra_joblib_launcher",
    "hydra/sweeper/optuna": "hydra_optuna_sweeper",
}


def explain_composition(
    error: HydraException | OmegaConfBaseException | YAMLError,
    overrides: Sequence[str],
    config_name: str = "config",
) -> ConfigError:
    """Return the error to raise for one that was raised while composing.

    Args:
        error: Hydra's.
        overrides: All words of the command line.
        config_name: The file that is composed.
    """
    text = str(error)
    if found := re.search(r"Could not (?:find|load) '(hydra/\w+/\w+)'", text):
        _require_plugin(found[1])
    found = re.match(r"Could not override '([^']+)'", text)
    if found and found[1] in {override.key_or_group for override in parse(overrides)}:
        return _explain_key(found[1], overrides, error, config_name)
    if found := re.match(r"Could not delete from config\. '([^']+)' does not exist", text):
        return unknown_key(found[1], Value.NOT_SHOWN, _known_beside(found[1], [], config_name))
    if found := re.search(
        r"Could not find '([^']+)/([^'/]+)'\s+Available options in '[^']+':(.*?)Config search path",
        text,
        re.DOTALL,
    ):
        return ConfigError(found[1], f"must be one of {', '.join(found[3].split())}", found[2])
    if found := re.search(r"Could not load '([^']+)/([^'/]+)'", text):
        return ConfigError(found[1], "must be one of the options that there are", found[2])
    return ConfigError(config_name, f"cannot be composed: {_reason(error)}")


def _require_plugin(option: str) -> None:
    """Check that the plugin which brings an option of Hydra's own groups is installed."""
    if option in _PLUGINS:
        require(f"hydra_plugins.{_PLUGINS[option]}", option.rpartition("/")[0])


def _explain_key(key: str, overrides: Sequence[str], error: Exception, config_name: str) -> ConfigError:
    """Return the error for a key that the configuration doesn't have, or that doesn't take the value."""
    value, word = {
        o.key_or_group: (o.value(), word) for word, o in zip(overrides, parse(overrides), strict=True)
    }[key]
    known = _known_beside(key, [other for other in overrides if other != word], config_name)
    if key.rpartition(".")[2] in known:
        return ConfigError(key, f"cannot be set: {_reason(error)}", value)
    return unknown_key(key, value, known)


def _known_beside(key: str, overrides: Sequence[str], config_name: str) -> list[str]:
    """Return the keys that a configuration has where another was looked for."""
    parent = OmegaConf.select(compose(config_name, list(overrides)), key.rpartition(".")[0] or "")
    return [str(name) for name in parent] if isinstance(parent, DictConfig) else []


def locate(error: Exception, config: DictConfig, near: str) -> ConfigError:
    """Return an error about an argument as one about its full key: ``top_k`` becomes ``experts.top_k``.

    Args:
        error: What the constructor raised, or Hydra for it.
        config: The configuration; its first key that ends in the argument's name is meant, below ``near`` if possible.
        near: The key of the node that was built; errors about no argument are about this key.
    """
    if isinstance(error, InstantiationException):
        found = re.search(r"full_key: (\S+)", str(error))
        near = found[1] if found else near
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if not isinstance(error, ConfigError):
        return ConfigError(near, f"cannot be used: {one_line(str(error)).removesuffix('.')}")
    keys = [key for key in _keys(config) if f".{key}".endswith(f".{error.name}")]
    if keys:
        return error.renamed(min(keys, key=lambda key: not key.startswith(f"{near}.")))
    return ConfigError(near, f"has a parameter {error.name!r} that {error.rule}", error.value, error.fix)


def _keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yield the full key of each value that isn't an interpolation."""
    for name in map(str, config):
        key = f"{prefix}{name}"
        if OmegaConf.is_interpolation(config, name) or OmegaConf.is_missing(config, name) or key == "hydra":
            continue
        yield key
        if isinstance(value := config[name], DictConfig):
            yield from _keys(value, f"{key}.")


def one_line(text: str) -> str:
    """Return the text with every run of white space as one blank, and nothing that a terminal would obey."""
    return printable(" ".join(text.split()))


def _reason(error: Exception) -> str:
    return one_line(f"{error} {error.__cause__ or ''}").removesuffix(".")
