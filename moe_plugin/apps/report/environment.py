"""The versions and the machine of a run: `environment.json` in its folder, written by the run."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import torch

from moe_plugin import __version__
from moe_plugin.apps.received.printable import printable
from moe_plugin.apps.received.regular_file import read_json
from moe_plugin.apps.report.atomic_write import write_atomically

ENVIRONMENT_FILE = "environment.json"


def describe_environment(world_size: int, device: torch.device) -> dict[str, str]:
    """Return the versions and the machine of this process.

    Args:
        world_size: Processes of the run.
        device: Device of this one.
    """
    import lightning

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    return {
        "moe_plugin": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": f"{world_size} x {device.type}, {name}, {torch.get_num_threads()} threads",
    }


def write_environment(environment: dict[str, str], folder: Path) -> None:
    """Write what `describe_environment` returns into the run's folder, in one move, as `read_environment` reads it."""
    write_atomically(folder / ENVIRONMENT_FILE, json.dumps(environment, indent=1) + "\n")


def read_environment(folder: Path) -> dict[str, str]:
    """Read what `write_environment` wrote; empty without the file."""
    path = folder / ENVIRONMENT_FILE
    if not path.exists():
        return {}
    return {printable(k): printable(v) for k, v in read_json(path, ENVIRONMENT_FILE).items()}
