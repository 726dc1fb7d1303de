"""``moe-simulate``: every rule on every source of scores, as a table and a picture, in seconds and without a model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from moe_plugin.apps.launch.command import run
from moe_plugin.apps.simulate.check import PARTS, check_trials


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Words after the program's name; by default the program's own.
    """
    words = sys.argv[1:] if arguments is None else arguments
    run(words, simulate, config_name="simulate", check=check_trials)


def simulate(config: DictConfig) -> float:
    """Try every rule on every source; Hydra calls it.

    Returns:
        The MaxVio that rules settled at, mean over rules and sources; a sweep with one rule can minimise it.
    """
    import torch
    from rich.console import Console

    from moe_plugin.apps.simulate.picture import trial_picture
    from moe_plugin.apps.simulate.trial import try_rule
    from moe_plugin.apps.simulate.trial_table import trial_table

    torch.set_num_threads(1)
    setting, rules, sources = (_build(config, key) for key in PARTS)
    trials = {
        name: {label: try_rule(rule, source, setting) for label, rule in rules.items()}
        for name, source in sources.items()
    }
    out = Path(HydraConfig.get().runtime.output_dir, "rules.png")
    Console().print(trial_table(trials, setting))
    print(trial_picture(trials, setting, out))
    settled = [trial.tail_expected for by_rule in trials.values() for trial in by_rule.values()]
    return sum(settled) / len(settled)


def _build(config: DictConfig, key: str) -> Any:
    return instantiate(config[key], _convert_="all")


if __name__ == "__main__":
    main()
