"""Where and with what a measurement was made."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

MALLOC = {
    "default": {},
    # Freed memory is kept, so a step does not ask the kernel for its pages again.
    "tuned": {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"},
}
"""Environment variables of each setting of the C library's allocator."""


def describe() -> dict[str, Any]:
    """Return the machine and the versions of what is measured."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": torch.cpu._is_avx512_bf16_supported(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version_of(name) for name in ("torch", "lightning", "transformers")},
    }


def load() -> float:
    """Return the number of processes that wanted to run, over the last minute."""
    return os.getloadavg()[0]


def version_of(package: str) -> str | None:
    """Return the version of an installed package; None if it is absent."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
