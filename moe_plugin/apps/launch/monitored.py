"""Whether what a callback watches will be logged: Lightning notices only after the first validation."""

from __future__ import annotations

from omegaconf import DictConfig

from moe_plugin.apps.launch.config_nodes import nodes
from moe_plugin.errors import ConfigError

_LOGGED = (
    *(
        "train/loss",
        "train/auxiliary_loss",
        "val/loss",
        "val/max_violation_batch",
        "val/max_violation_global",
    ),
    *("val/load_entropy", "val/dead_experts", "val/experts_per_token", "epoch", "step"),
)
"""What our models and `LoadMonitor` log through Lightning."""
_OURS, _FRAMEWORKS = "moe_plugin.", ("moe_plugin.", "lightning.")


def check_monitored(config: DictConfig) -> None:
    """Check what callbacks monitor, if nothing but our own and Lightning's classes can log.

    Raises:
        ConfigError: It will not be logged.
    """
    callbacks = dict(nodes(config.callbacks or DictConfig({}), "callbacks."))
    others = [node for node in callbacks.values() if not str(node._target_).startswith(_FRAMEWORKS)]
    if others or not str(config.model._target_).startswith(_OURS):
        return
    for key, node in callbacks.items():
        name = node.get("monitor")
        if name is not None and name not in _LOGGED and not str(name).startswith("lr-"):
            raise ConfigError(f"{key}.monitor", f"must be one of {', '.join(_LOGGED)}", name)
