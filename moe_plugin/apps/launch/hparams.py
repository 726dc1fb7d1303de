"""What TensorBoard's HPARAMS tab compares: the settings of each job, and the measures it ends with."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import yaml
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard.summary import hparams

from moe_plugin.apps.launch.build import LOSS_FREE
from moe_plugin.apps.report.sweep import overrides_of

METRICS = ("val/loss", "val/max_violation_global", "val/max_violation_batch", "val/dead_experts")
GROUPS = ("experiment", "model", "router", "experts", "balancing", "rule", "data", "trainer", "strategy")
"""The settings that are compared; the others say where files are and what is shown."""


@rank_zero_only
def log_hyperparameters(loggers: Iterable[Logger], folder: Path, seed: int) -> None:
    """Write the seed and the given settings on the first rank, and name the measures: the last scalars of these names.

    A setting that is a default and not swept over is left out: a column of equal values shows nothing, and the run's
    `config.yaml` has them all. An option of a group is one value, such as `router: top_p`.

    Args:
        loggers: Only TensorBoard's get them.
        folder: The run's, in which Hydra has noted what was given.
        seed: The run's.
    """
    given = {
        key: _value(value)
        for key, value in overrides_of(folder).items()
        if key.split(".")[0] in GROUPS or key.startswith(f"callbacks.{LOSS_FREE}.")
    }
    plain = {
        key: value if isinstance(value, (int, float, str)) else str(value) for key, value in given.items()
    }
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            given = {"seed": seed} | plain
            logger.log_hyperparams(given, metrics={})  # with metrics it would log them as points at step 0
            for summary in hparams(given, dict.fromkeys(METRICS, 0.0)):
                logger.experiment.file_writer.add_summary(summary)


def _value(text: str) -> object:
    """Return what a word's text stands for; a glob such as ``*router`` is no YAML, but a text."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
