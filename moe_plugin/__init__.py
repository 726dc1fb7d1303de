"""Auxiliary-loss-free load balancing for mixture-of-experts training."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_plugin.attach.adapter import Adapter
    from moe_plugin.attach.balance import balance_
    from moe_plugin.balancing.rules import (
        PID,
        Adaptive,
        Momentum,
        Multiplicative,
        PrimalDual,
        Proportional,
        Quantile,
        Sign,
    )
    from moe_plugin.balancing.schedule import RateSchedule
    from moe_plugin.callbacks.calibration import Calibration
    from moe_plugin.callbacks.load_monitor import LoadMonitor
    from moe_plugin.callbacks.loss_free import LossFreeBalancing
    from moe_plugin.checkpoints import VerifiedCheckpointIO
    from moe_plugin.sharding import shard_

__all__ = [
    "PID",
    "Adapter",
    "Adaptive",
    "Calibration",
    "LoadMonitor",
    "LossFreeBalancing",
    "Momentum",
    "Multiplicative",
    "PrimalDual",
    "Proportional",
    "Quantile",
    "RateSchedule",
    "Sign",
    "VerifiedCheckpointIO",
    "balance_",
    "shard_",
]
__version__ = "0.1.0"

_RULES = ("Adaptive", "Momentum", "Multiplicative", "PID", "PrimalDual", "Proportional", "Quantile", "Sign")
_HOMES = dict.fromkeys(_RULES, "moe_plugin.balancing.rules") | {
    "Adapter": "moe_plugin.attach.adapter",
    "Calibration": "moe_plugin.callbacks.calibration",
    "LoadMonitor": "moe_plugin.callbacks.load_monitor",
    "LossFreeBalancing": "moe_plugin.callbacks.loss_free",
    "RateSchedule": "moe_plugin.balancing.schedule",
    "VerifiedCheckpointIO": "moe_plugin.checkpoints",
    "balance_": "moe_plugin.attach.balance",
    "shard_": "moe_plugin.sharding",
}


def __getattr__(name: str) -> Any:
    # Torch and lightning take seconds to import, and the command line's help and typing errors need neither.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
