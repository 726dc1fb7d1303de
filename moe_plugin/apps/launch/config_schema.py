"""Types of the settings outside ``_target_`` nodes; for those, their constructors' hints are the types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass
class Settings:
    """The settings that belong to no group."""

    name: str
    seed: int
    ckpt_path: str | None
    trust: bool
    override_optimizer: bool
    count_only: bool
    optimized_metric: str


@dataclass
class Strategy:
    """Where a run takes place: the number of processes, the switches, and ``"auto"`` or a ``_target_`` node."""

    devices: int | Literal["auto"]
    timeout: float
    lightning: Any
    activation_checkpointing: bool = False
    compile: str | None = None
    meta_init: bool = False
    tensor_parallel_size: int = 1
    expert_parallel_size: int | Literal["auto"] = 1


@dataclass
class Paths:
    """Folders."""

    runs: str
    output: str
