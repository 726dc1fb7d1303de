"""Composes configurations without running anything: one per job, so each is checked before the first runs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from hydra_plugins.moe_plugin_search_path import GROUPS
from moe_plugin.apps.config_folder import conf_dir
from moe_plugin.apps.launch.explain_config_error import explain_composition
from moe_plugin.apps.launch.overrides import choices, parse
from moe_plugin.errors import ConfigError

HYDRA_VERSION = "1.3"


def is_group(name: str) -> bool:
    """Return whether one of our config groups has this name."""
    return any((folder / name).is_dir() for folder in (conf_dir(), GROUPS))


def quote_option(word: str) -> str:
    """Put options that are numbers in quotes, as Hydra wants them: ``experts=8,16`` becomes ``experts="8","16"``."""
    group, equals, options = word.partition("=")
    if not equals or not re.fullmatch(r"\w+", group) or not is_group(group):
        return word
    return f"{group}=" + re.sub(r"(?<![^,])\d+(?![^,])", r'"\g<0>"', options)


def compose_jobs(
    overrides: Sequence[str],
    *,
    multirun: bool,
    config_dir: str | None = None,
    config_name: str = "config",
) -> Iterator[DictConfig]:
    """Yield the configuration (with its ``hydra`` node) of a run, or that of every job of a grid sweep.

    A sampler such as Optuna chooses its values as it goes: then one is yielded, without the swept keys.

    Args:
        overrides: The command line's ``key=value`` words.
        multirun: Whether it is a sweep.
        config_dir: A user's own folder of groups, searched first (Hydra's ``--config-dir``).
        config_name: The file of `conf_dir` to begin with.

    Raises:
        ConfigError: A word is malformed, or names what is not there.
    """
    parse(overrides)  # a malformed word is reported first
    if config_dir is not None:
        overrides = [*overrides, f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"]
    with initialize_config_dir(str(conf_dir()), version_base=HYDRA_VERSION, job_name="train"):
        try:
            for words in _split_sweep(overrides, config_name) if multirun else [list(overrides)]:
                yield compose(config_name, words, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            raise explain_composition(error, overrides, config_name) from error


def _split_sweep(overrides: Sequence[str], config_name: str) -> list[list[str]]:
    """Return the words of each job of a sweep."""
    fixed = [words[0] for words in choices(overrides) if len(words) == 1]
    sweeper = compose(config_name, fixed, return_hydra_config=True).hydra.sweeper
    if not sweeper._target_.endswith("BasicSweeper"):
        return [fixed]
    configured = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    words = [*configured, *overrides]
    for word, values in zip(words, choices(words), strict=True):
        if not values:
            key, _, given = word.partition("=")
            fix = "Add hparams_search=optuna, or give values."
            raise ConfigError(key, "must be values, since no sampler draws from ranges", given, fix)
    return [list(job) for job in itertools.product(*choices(words))]


def without_hydra(config: DictConfig, output: Path) -> DictConfig:
    """Return the run's own configuration, resolved.

    Args:
        config: As composed, with the ``hydra`` node.
        output: The run's folder.
    """
    run = OmegaConf.masked_copy(config, [key for key in map(str, config) if key != "hydra"])
    with open_dict(run):
        run.paths.output = str(output)
    OmegaConf.resolve(run)
    return run
