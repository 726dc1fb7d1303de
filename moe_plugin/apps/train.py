"""Trains a mixture-of-experts model: ``moe-train`` or ``python -m moe_plugin.apps.train``; ``--help`` has examples."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_plugin.apps.launch.end_process import run_and_end
from moe_plugin.apps.launch.process_environment import is_first_node, is_launched, limit_spinning
from moe_plugin.apps.launch.signals import StopSignals

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Words after the program's name; by default the program's own.
    """
    limit_spinning()
    with StopSignals():
        # Hydra and torch take seconds to import: signals are obeyed in that time too.
        if is_launched():
            _train_by_hand(sys.argv[1:] if arguments is None else arguments)
        else:
            _run(sys.argv[1:] if arguments is None else arguments)


def _run(arguments: Sequence[str]) -> None:
    from moe_plugin.apps.launch.check_jobs import check_jobs
    from moe_plugin.apps.launch.command import run

    run(arguments, train, config_name="config", check=check_jobs)


def _train_by_hand(arguments: Sequence[str]) -> None:
    """Run the command line in a process that torchrun has started."""
    from moe_plugin.apps.launch import torchrun_config
    from moe_plugin.apps.launch.command import one_line_errors
    from moe_plugin.apps.launch.train_job import train as train_here

    if not torchrun_config.is_follower():
        try:
            _run(arguments)
        finally:
            torchrun_config.release()
    elif config := torchrun_config.receive():
        with one_line_errors():
            train_here(config)


def train(composed: DictConfig) -> float | None:
    """Run one job in its own folder; Hydra calls it.

    Args:
        composed: The configuration with its ``hydra`` node.

    Returns:
        The metric that a sweeper optimises, ``optimized_metric`` of the run's summary; None after a dry run.
    """
    from hydra.core.hydra_config import HydraConfig

    from moe_plugin.apps.launch import torchrun_config
    from moe_plugin.apps.launch.compose import without_hydra
    from moe_plugin.apps.launch.disk_errors import DiskErrors
    from moe_plugin.apps.launch.last_checkpoint import find_checkpoint
    from moe_plugin.apps.launch.processes import number_of_processes, run_in_processes
    from moe_plugin.apps.launch.resumed_settings import report_resume
    from moe_plugin.apps.launch.run_folder import prepare_
    from moe_plugin.apps.launch.train_job import train as train_here

    folder = Path(HydraConfig.get().runtime.output_dir)
    config = without_hydra(composed, folder)
    config.ckpt_path = find_checkpoint(config.ckpt_path, folder, trusted=config.trust)
    report_resume(config)
    if is_first_node(config):
        with DiskErrors(folder):
            prepare_(folder, config)
    if is_launched():
        torchrun_config.share(config)
        train_here(config)
    elif number_of_processes(config) * config.trainer.num_nodes == 1:
        train_here(config)
    else:
        run_in_processes(folder, config)
    summary = folder / "summary.json"
    return json.loads(summary.read_text())[config.optimized_metric] if summary.exists() else None


if __name__ == "__main__":
    run_and_end(main) if is_launched() else main()
