"""What becomes of settings that differ from those of the run that a checkpoint is from."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

from moe_plugin.apps.launch.build import to_plain
from moe_plugin.apps.launch.resumed_end import end_of
from moe_plugin.checkpoints.safe_load import load_file
from moe_plugin.checkpoints.sharded import LIGHTNINGS_PART, is_sharded
from moe_plugin.checkpoints.verified_io import is_remote
from moe_plugin.errors import CheckpointError, ConfigError

KEY = "run_config"
"""Of the settings in a checkpoint."""
NOT_COMPARED = re.compile(r"(ckpt_path|trust|name|count_only|optimized_metric|override_optimizer|paths\..*)")
"""Where the run is, and what it does not train with."""
OPTIMIZERS = re.compile(r"model\.optimizer\.(?!warmup_steps|floor).*")
"""What a checkpoint's optimizer holds. The schedule is a function, which checkpoints do not hold."""
CALLBACKS = re.compile(r"callbacks\.\w+\.patience")
"""What a checkpoint's callback holds: Lightning's `EarlyStopping` continues with its own patience."""
NEEDED = {"global_step", "loops", "callbacks"}
"""Of Lightning; a checkpoint of the weights only has less."""
ABSENT = "nothing"
UNKNOWN = "resume: changed settings are not told, since the checkpoint holds none or is remote"


class StoredSettings(Callback):
    """Saves a run's settings in its checkpoints."""

    def __init__(self, config: DictConfig) -> None:
        """Take the run's resolved configuration."""
        self._settings = OmegaConf.to_container(config)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the settings."""
        checkpoint[KEY] = self._settings


@dataclass(frozen=True)
class Change:
    """A setting that is not the checkpoint's."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        """Return it as one line."""
        key = self.key if self.key.isprintable() else repr(self.key)
        line = f"resume: {key}={self.after!r} takes effect, {self.before!r} before"
        return f"{line} (on the order of the data; random numbers go on)" if self.key == "seed" else line


def report_resume(run: DictConfig) -> None:
    """Print what `check_resume` says, if the run continues from a checkpoint.

    Args:
        run: A run's resolved configuration.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        ConfigError: A setting would be ignored, or nothing is left to train.
    """
    for line in [] if run.ckpt_path is None else check_resume(run):
        print(line, file=sys.stderr, flush=True)


def check_resume(run: DictConfig) -> list[str]:
    """Check that a run can continue from its checkpoint with its settings.

    Args:
        run: A run's resolved configuration with a ``ckpt_path`` that exists.

    Returns:
        What to tell the user: a line for each setting that differs.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        ConfigError: A setting would be ignored, or nothing is left to train.
    """
    if is_remote(run.ckpt_path):
        return [UNKNOWN]
    checkpoint = _read(run.ckpt_path, trusted=run.trust)
    stored = checkpoint.get(KEY)
    changes = list(_changes(stored, to_plain(run))) if isinstance(stored, Mapping) else []
    for change in changes:
        _check_heeded(change, overrides=run.override_optimizer)
    lines = list(map(str, changes)) if isinstance(stored, Mapping) else [UNKNOWN]
    return [*lines, *end_of(run, checkpoint, {change.key for change in changes})]


def _read(path: str, *, trusted: bool) -> dict[str, Any]:
    """Return a checkpoint without reading its tensors."""
    file = Path(path, LIGHTNINGS_PART) if is_sharded(path) else Path(path)
    checkpoint = load_file(file, trusted=trusted, mmap=True)
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= NEEDED:
        needs = ", ".join(sorted(NEEDED))
        raise CheckpointError(
            f"'ckpt_path' must be a checkpoint to continue from, with {needs}, got {path!r}."
        )
    return checkpoint


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Change]:
    """Yield each setting that differs; one that interpolations repeat comes once, by its shortest key.

    Of paths the part below the run's folder counts.
    """
    old, new = dict(_flat(before)), dict(_flat(after))
    for values in (old, new):
        folder = str(values.get("paths.output"))
        values.update({k: v.replace(folder, "") for k, v in values.items() if isinstance(v, str)})
    seen = set()
    for key in sorted(old.keys() | new.keys(), key=lambda key: (key.count("."), key)):
        values = old.get(key, ABSENT), new.get(key, ABSENT)
        repeated = (key.rpartition(".")[2], repr(values))
        if values[0] != values[1] and not NOT_COMPARED.fullmatch(key) and repeated not in seen:
            seen.add(repeated)
            yield Change(key, *values)


def _flat(node: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value of nested mappings with its key."""
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _check_heeded(change: Change, *, overrides: bool) -> None:
    """Check that a setting is not ignored for what the checkpoint holds."""
    if OPTIMIZERS.fullmatch(change.key) and not overrides:
        fix = "Add override_optimizer=true to continue with the new value."
    elif CALLBACKS.fullmatch(change.key):
        fix = "Leave it, or start a new run."
    else:
        return
    raise ConfigError(change.key, f"must be the checkpoint's ({change.before!r})", change.after, fix)
