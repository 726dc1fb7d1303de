"""Checks the trials of ``moe-simulate`` before the first runs, as far as possible before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig

from moe_plugin.apps.launch.bounds import check_seed
from moe_plugin.apps.launch.config_nodes import check_nodes, check_nodes_in_source
from moe_plugin.apps.launch.early_checks import check_run_folder
from moe_plugin.apps.launch.explain_config_error import locate
from moe_plugin.apps.launch.rate_bounds import check_rates
from moe_plugin.errors import ConfigError
from moe_plugin.extras import require
from moe_plugin.number_checks import check_integer

PARTS = ("setting", "rules", "sources")
_MOST = {"num_experts": 2**16, "top_k": 2**16, "tokens": 2**30, "steps": 10**9}
"""Sizes above which a trial fits no machine."""


def check_trials(configs: Sequence[DictConfig]) -> None:
    """Check the configuration of each job, see `run`.

    Args:
        configs: As composed.

    Raises:
        ConfigError: A value is not allowed (it names the full key), or the picture needs a package.
    """
    require("matplotlib", "moe-simulate")
    for config in configs:
        _check_early(config)
    for config in configs:
        check_nodes(config)
        for key in PARTS:
            _check_built(config, key)


def _check_built(config: DictConfig, key: str) -> None:
    """Check that a part can be built."""
    try:
        instantiate(config[key], _convert_="all")
    except (InstantiationException, ValueError, TypeError, ImportError) as error:
        raise locate(error, config, near=key) from error


def _check_early(config: DictConfig) -> None:
    for key in PARTS:
        if not isinstance(config.get(key), DictConfig) or not config[key]:
            raise ConfigError(key, "must have at least one", config.get(key))
    check_nodes_in_source(config)
    for name, most in _MOST.items():
        key, value = f"setting.{name}", config.setting[name]
        check_integer(key, value)
        if value > most:
            raise ConfigError(key, f"must be <= {most}", value)
    check_seed("setting.seed", config.setting.seed)
    check_rates(config.rules, config.setting.score, "rules")
    check_run_folder(config)
