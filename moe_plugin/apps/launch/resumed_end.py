"""Whether a run has anything left to train."""

from __future__ import annotations

from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from moe_plugin.apps.launch.build import to_plain
from moe_plugin.apps.launch.time_limit import TimeLimit
from moe_plugin.errors import ConfigError


def check_trains(run: DictConfig) -> None:
    """Check that a run trains at all.

    Args:
        run: Its resolved configuration.

    Raises:
        ConfigError: It has no batches or no time.
    """
    if run.trainer.limit_train_batches == 0:
        raise ConfigError("trainer.limit_train_batches", "must be null or > 0", 0)
    if _seconds(run) == 0:
        raise ConfigError("trainer.max_time", "must be null or longer than 0 s", run.trainer.max_time)


def end_of(run: DictConfig, checkpoint: dict[str, Any], changed: Set[str]) -> list[str]:
    """Return what to tell the user of a run that was trained to its end; nothing if it continues.

    A run's own command may come again, as a queue repeats it. Then the run is only validated.

    Args:
        run: A run's resolved configuration with its ``ckpt_path``.
        checkpoint: What it continues from.
        changed: Keys of settings that are not the checkpoint's.

    Raises:
        ConfigError: Nothing would be trained, and the command is another one.
    """
    is_own = Path(run.paths.output).absolute() in Path(run.ckpt_path).absolute().parents
    for name, limit, trained in _limits(run, checkpoint):
        key, value = f"trainer.{name}", run.trainer[name]
        if limit < 0 or trained < limit:
            continue
        if not is_own or key in changed:
            rule = f"must be more than the checkpoint has trained ({trained:.0f})"
            raise ConfigError(key, rule, value, "moe-eval validates a checkpoint.")
        return [f"resume: the run has reached its end ({key}={value}) and is only validated again"]
    return []


def _limits(run: DictConfig, checkpoint: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Yield the name of each limit, the limit (below 0 if there is none), and how much of it is trained."""
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    timer = checkpoint["callbacks"].get(TimeLimit.__qualname__, {"time_elapsed": {"train": 0}})
    yield "max_steps", run.trainer.max_steps, checkpoint["global_step"]
    yield "max_epochs", -1 if run.trainer.max_epochs is None else run.trainer.max_epochs, epochs
    yield "max_time", _seconds(run), timer["time_elapsed"]["train"]


def _seconds(run: DictConfig) -> float:
    """Return the time a run has, in seconds; -1 if it has no limit."""
    max_time = run.trainer.max_time
    return -1 if max_time is None else TimeLimit(to_plain(max_time))._duration or 0
