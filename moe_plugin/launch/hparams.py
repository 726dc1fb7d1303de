"""What TensorBoard's HPARAMS tab compares: the settings of each job, and the measures it ends with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from omegaconf import DictConfig, OmegaConf

METRICS = ("val/loss", "val/max_violation_global", "val/max_violation_batch", "val/dead_experts")
GROUPS = ("seed", "model", "router", "experts", "balancing", "data", "trainer", "strategy")
"""The settings that are compared; the others say where files lie and what is shown."""


def log_hyperparameters(loggers: Iterable[Logger], config: DictConfig) -> None:
    """Write the settings of a run, with measures that later scalars of the same names fill in.

    Args:
        loggers: Those that are not TensorBoard are left alone.
        config: The run's resolved configuration.
    """
    settings = {key: OmegaConf.to_container(config)[key] for key in GROUPS}  # pyright: ignore
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(dict(_leaves(settings)), metrics=dict.fromkeys(METRICS, float("nan")))


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        elif not str(name).startswith("_") or name == "_target_":
            yield f"{prefix}{name}", value if isinstance(value, (int, float, str)) else str(value)
