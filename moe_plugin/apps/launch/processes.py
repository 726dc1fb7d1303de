"""Runs one job in several processes: each starts from the run's resolved configuration, never from the command line.

So a console script, ``python -m`` and each job of a sweep are launched the same way, and a job's processes can't
start a sweep of their own. torchrun's agent brings them up, and brings all down when one fails or a signal comes.
"""

from __future__ import annotations

import os
import sys
import uuid
from pathlib import Path

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from omegaconf import DictConfig
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from moe_plugin.apps.launch.error_report import reported_error
from moe_plugin.apps.launch.process_environment import for_processes, is_launched
from moe_plugin.apps.launch.quiet_logs import quiet_agent
from moe_plugin.apps.launch.signals import STOP_SIGNALS, STOPPED, StopSignals
from moe_plugin.apps.report.stopped import can_go_on
from moe_plugin.errors import ConfigError, RunError


def number_of_processes(config: DictConfig) -> int:
    """Return how many processes the job wants on each machine: one per device."""
    devices = config.strategy.devices
    if devices != "auto":
        return devices
    return max(1, torch.cuda.device_count()) if config.trainer.accelerator != "cpu" else 1


def check_processes(config: DictConfig) -> None:
    """Check that this machine can run the processes that a job wants.

    Raises:
        ConfigError: More than there are GPUs, others than torchrun has started, or machines without a launcher.
    """
    devices, nodes, gpus = number_of_processes(config), config.trainer.num_nodes, torch.cuda.device_count()
    if config.trainer.accelerator in ("gpu", "cuda", "auto") and 0 < gpus < devices:
        fix = "trainer.accelerator=cpu takes any number."
        raise ConfigError("strategy.devices", f"must be <= {gpus}, the GPUs here", devices, fix)
    if is_launched() and devices * nodes != int(os.environ["WORLD_SIZE"]):
        processes = f"{os.environ['WORLD_SIZE']} processes with trainer.num_nodes={nodes}"
        raise ConfigError("strategy.devices", f"must give {processes}, as torchrun started them", devices)
    if nodes > 1 and not is_launched():
        rule = "must be 1 unless torchrun runs on each machine or hydra/launcher=slurm is given"
        raise ConfigError("trainer.num_nodes", rule, nodes, "docs/running.md has the lines.")


def run_in_processes(run_folder: Path, config: DictConfig) -> None:
    """Run a job in several processes, and wait.

    Args:
        run_folder: Holds the job's ``config.yaml``.
        config: The same configuration.

    Raises:
        RunError: A process failed; it names the user's error, if it was one. Otherwise the trace is above.
        SystemExit: A signal stopped the run; with code `STOPPED` if it can be continued.
    """
    launch = elastic_launch(_launch_config(config), sys.executable)
    with for_processes(number_of_processes(config)), StopSignals() as signals, quiet_agent():
        try:
            launch("-m", "moe_plugin.apps.launch.worker_process", str(run_folder))
        except SignalException as error:  # the agent has passed it on to the processes and waited for them
            signals.received = error.sigval
            raise SystemExit(STOPPED if can_go_on(run_folder) else 128 + error.sigval) from None
        except ChildFailedError as error:
            codes = {failure.exitcode for failure in error.failures.values()}
            if STOPPED in codes:  # a signal came to one of the processes, and they agreed
                raise SystemExit(STOPPED) from None
            rank, failure = error.get_first_failure()
            unknown = f"process {rank} of the run in {run_folder} failed with exit code {failure.exitcode}"
            raise RunError(reported_error(failure) or unknown) from None


def _launch_config(config: DictConfig) -> LaunchConfig:
    """Return how torchrun's agent starts the processes of this machine and finds the others."""
    nodes = config.trainer.num_nodes
    endpoint, run_id = ("localhost:0", uuid.uuid4().hex) if nodes == 1 else slurm_rendezvous()
    return LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=number_of_processes(config),
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        run_id=run_id,
        max_restarts=0,
        signals_to_handle=",".join(number.name for number in STOP_SIGNALS),
    )


def slurm_rendezvous() -> tuple[str, str]:
    """Return where the machines of a SLURM job meet, ``host:port``, and under what name."""
    host = SLURMEnvironment.resolve_root_node_address(os.environ["SLURM_JOB_NODELIST"])
    job_id = os.environ["SLURM_JOB_ID"]
    return f"{host}:{15000 + int(job_id) % 10000}", job_id
