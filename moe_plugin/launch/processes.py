"""Runs one job in several processes: each starts from the run's resolved configuration, never from the command line.

So a console script, ``python -m`` and each job of a sweep are launched the same way, and a job's processes can't
start a sweep of their own. torchrun brings them up, and brings all down when one fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig

from moe_plugin.errors import MoEPluginError


def number_of_processes(config: DictConfig) -> int:
    """Returns how many processes the job wants on this machine: one per device."""
    devices = config.strategy.devices
    if devices != "auto":
        return devices
    return max(1, torch.cuda.device_count()) if config.trainer.accelerator != "cpu" else 1


def is_launched() -> bool:
    """Says whether torchrun (ours or the user's) or another launcher has started this process as one of several."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def run_in_processes(run_folder: Path, count: int) -> None:
    """Runs the job whose ``config.yaml`` lies in the folder in ``count`` processes, and waits.

    Raises:
        MoEPluginError: A process failed; its own message is above.
    """
    threads = max(1, (os.cpu_count() or 1) // count)
    # They import what this process could import, wherever it was started from.
    environment = {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += ["-m", "moe_plugin.launch.worker", str(run_folder)]
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        raise MoEPluginError(f"A process of the run in {run_folder} failed with exit code {done.returncode}.")
