"""``moe-simulate``: every rule on every source of scores, as a table and a picture, in seconds and without a model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console

from moe_plugin.apps.launch.command import one_line_errors
from moe_plugin.apps.launch.compose import HYDRA_VERSION, conf_dir
from moe_plugin.apps.launch.signature import check_arguments
from moe_plugin.apps.launch.validate_config import attempt, locate_target, nodes, present
from moe_plugin.apps.simulate.picture import trial_picture
from moe_plugin.apps.simulate.trial import try_rule
from moe_plugin.apps.simulate.trial_table import trial_table

_PARTS = ("setting", "rules", "sources")


def main() -> None:
    """Run the command line."""
    hydra.main(config_path=str(conf_dir()), config_name="simulate", version_base=HYDRA_VERSION)(simulate)()


def simulate(config: DictConfig) -> float:
    """Try every rule on every source; Hydra calls it.

    Returns:
        The MaxVio that rules settled at, mean over rules and sources; a sweep with one rule can minimise it.
    """
    with one_line_errors():
        _check(config)
        torch.set_num_threads(1)
        setting, rules, sources = (_build(config, key) for key in _PARTS)
        trials = {
            name: {label: try_rule(rule, source, setting) for label, rule in rules.items()}
            for name, source in sources.items()
        }
    out = Path(HydraConfig.get().runtime.output_dir, "rules.png")
    Console().print(trial_table(trials, setting))
    print(trial_picture(trials, setting, out))
    settled = [trial.tail_expected for by_rule in trials.values() for trial in by_rule.values()]
    return sum(settled) / len(settled)


def _check(config: DictConfig) -> None:
    for key, node in nodes(config):
        check_arguments(locate_target(node, key), present(node), key)
    for key in _PARTS:
        attempt(partial(_build, key=key), config, config, key)


def _build(config: DictConfig, key: str) -> Any:
    return instantiate(config[key], _convert_="all")


if __name__ == "__main__":
    main()
