"""The results of a run in numbers: `summary.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from moe_plugin.apps.received.regular_file import read_json
from moe_plugin.apps.report.json_file import write_json
from moe_plugin.errors import ConfigError

SUMMARY_FILE = "summary.json"
CONFIG_FILE = "config.yaml"
"""The resolved configuration, in the same folder."""


@dataclass(frozen=True)
class RunSummary:
    """The measures of a finished run; None if not measured.

    Attributes:
        val_loss: Mean negative log-likelihood per token of the validation set, in nats.
        perplexity: `exp(val_loss)`.
        max_violation_batch: MaxVio of each validation batch, mean over batches and layers.
        max_violation_global: MaxVio over the whole validation set, mean over layers.
        dead_experts: Experts without a token in the whole validation set, all layers together.
        tokens_per_second: Training tokens per second.
        seconds: Wall time of training.
        seed: The seed of the run.
        parameters_total: Parameters of the model.
        parameters_active: Parameters that one token uses.
        mean_experts_per_token: Routed experts that a token of the validation set used, mean over tokens and layers.
        target_experts_per_token: How many it should use.
        active_flops_per_token: Operations of a token's forward with as many experts as were used.
    """

    val_loss: float | None
    perplexity: float | None
    max_violation_batch: float | None
    max_violation_global: float | None
    dead_experts: int | None
    tokens_per_second: float | None
    seconds: float
    seed: int | None
    parameters_total: int
    parameters_active: int
    mean_experts_per_token: float | None = None
    target_experts_per_token: float | None = None
    active_flops_per_token: float | None = None


def write_summary(summary: RunSummary, folder: Path) -> Path:
    """Write a summary into the run's folder, in one move, as `read_summary` reads it.

    NaN and infinity, which JSON does not have, become null.

    Returns:
        The file.
    """
    path = folder / SUMMARY_FILE
    write_json(path, asdict(summary))
    return path


def read_summary(path: Path) -> RunSummary:
    """Read what `write_summary` wrote.

    Raises:
        ConfigError: The file is damaged, or another one.
    """
    values, known = read_json(path, SUMMARY_FILE), {field.name for field in fields(RunSummary)}
    try:
        return RunSummary(**{key: _number(value) for key, value in values.items() if key in known})
    except TypeError as error:
        raise ConfigError(SUMMARY_FILE, "must be a run's numbers", str(path)) from error


def _number(value: Any) -> Any:
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    raise TypeError(value)
