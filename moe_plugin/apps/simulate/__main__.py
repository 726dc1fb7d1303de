"""``moe-simulate``: every rule on every source of scores, as a table and a picture, in seconds and without a model."""

from __future__ import annotations

from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console

from moe_plugin.apps.launch.command import one_line_errors
from moe_plugin.apps.launch.compose import HYDRA_VERSION, conf_dir
from moe_plugin.apps.launch.explain_config_error import one_line
from moe_plugin.apps.launch.signature import check_arguments
from moe_plugin.apps.launch.validate_config import locate_target, nodes, present
from moe_plugin.apps.simulate.picture import trial_picture
from moe_plugin.apps.simulate.trial import try_rule
from moe_plugin.apps.simulate.trial_table import trial_table
from moe_plugin.errors import ConfigError


def main() -> None:
    """Run the command line."""
    hydra.main(config_path=str(conf_dir()), config_name="simulate", version_base=HYDRA_VERSION)(simulate)()


def simulate(config: DictConfig) -> float:
    """Try every rule on every source; Hydra calls it.

    Returns:
        What the rules settled at, mean over rules and sources: what a sweep with one rule can minimise.
    """
    with one_line_errors():
        check(config)
        torch.set_num_threads(1)
        setting, rules, sources = (build(config, key) for key in ("setting", "rules", "sources"))
        trials = {
            name: {label: try_rule(rule, source, setting) for label, rule in rules.items()}
            for name, source in sources.items()
        }
    out = Path(HydraConfig.get().runtime.output_dir, "rules.png")
    Console().print(trial_table(trials, setting))
    print(trial_picture(trials, setting, out))
    settled = [trial.tail_expected for by_rule in trials.values() for trial in by_rule.values()]
    return sum(settled) / len(settled)


def check(config: DictConfig) -> None:
    """Check every key against what takes it.

    Raises:
        ConfigError: Names the key, the value and what is allowed.
    """
    for key, node in nodes(config):
        check_arguments(locate_target(node, key), present(node), key)


def build(config: DictConfig, key: str):
    """Build a part of the configuration.

    Raises:
        ConfigError: A value is not allowed.
    """
    try:
        return instantiate(config[key], _convert_="all")
    except InstantiationException as error:
        raise ConfigError(one_line(str(error.__cause__ or error))) from error


if __name__ == "__main__":
    main()
