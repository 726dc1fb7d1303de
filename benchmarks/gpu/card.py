"""The card, its driver, and the packages that a run uses."""

from __future__ import annotations

import subprocess
from typing import Any

import torch

from benchmarks.gpu.place import Place
from benchmarks.machine import describe, version_of

PACKAGES = ("triton", "hydra-core")


def describe_here(place: Place) -> dict[str, Any]:
    """Return the machine, its card and its packages.

    Args:
        place: A rehearsal has no card.
    """
    machine = describe() | {name: version_of(name) for name in PACKAGES} | {"gpu": None}
    if place.dry:
        return machine
    properties = torch.cuda.get_device_properties()
    return machine | {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "gpu_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.split("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        return None
