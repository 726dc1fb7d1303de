"""The names that a plan's settings may have."""

from __future__ import annotations

from typing import Literal

LAYOUTS = ("ddp", "fsdp", "ep")
Precision = Literal["32-true", "bf16-true", "bf16-mixed"]
