"""Trains a mixture-of-experts model: ``moe-train`` or ``python -m moe_plugin.train``; ``--help`` has examples."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from moe_plugin.launch.command import run


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        arguments: Words after the program's name; by default the program's own.
    """
    run(sys.argv[1:] if arguments is None else arguments, train)


def train(composed: DictConfig) -> float | None:
    """Runs one job in its own folder; Hydra calls it.

    Args:
        composed: The configuration with its ``hydra`` node.

    Returns:
        The metric that a sweeper optimises, ``optimized_metric`` of the run's summary; None after a dry run.
    """
    from moe_plugin.launch.check import without_hydra
    from moe_plugin.launch.job import train as train_here
    from moe_plugin.launch.processes import is_launched, number_of_processes, run_in_processes

    folder = Path(HydraConfig.get().runtime.output_dir)
    config = without_hydra(composed, folder)
    OmegaConf.save(config, folder / "config.yaml")
    processes = number_of_processes(config)
    if processes == 1 or is_launched():
        train_here(config)
    else:
        run_in_processes(folder, processes)
    summary = folder / "summary.json"
    return json.loads(summary.read_text())[config.optimized_metric] if summary.exists() else None


if __name__ == "__main__":
    main()
