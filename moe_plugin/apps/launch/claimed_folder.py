"""The folder of a run or sweep, claimed before Hydra writes into it: a dated one is new, and one command uses it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from moe_plugin.apps.launch.folder_lock import locked, writable


@contextmanager
def claimed_folder(config: DictConfig, key: str) -> Iterator[str]:
    """Make and lock the folder of a run or a sweep within the block; yield the word that names it to Hydra.

    Args:
        config: The configuration of the run, or of the sweep's first job, as composed.
        key: ``hydra.run.dir`` or ``hydra.sweep.dir``.

    Raises:
        ConfigError: Another command uses the folder, or it cannot be written.
    """
    folder = Path(OmegaConf.select(config, key))
    if _is_dated(config, key):
        with writable(folder, key):
            folder = new_folder(folder)
    with locked(folder, key):
        quoted = str(folder).replace("'", r"\'")
        yield f"{key}='{quoted}'"


def new_folder(wanted: Path) -> Path:
    """Make a folder that did not exist, and return it: the wanted one, or one with ``_2``, ``_3`` and so on added."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    others = (wanted.with_name(f"{wanted.name}_{number}") for number in itertools.count(2))
    return next(folder for folder in itertools.chain([wanted], others) if _is_made(folder))


def _is_made(folder: Path) -> bool:
    """Make a folder; return False if it is there already, made by whomever."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def _is_dated(config: DictConfig, key: str) -> bool:
    """Return whether a folder is named after the time, rather than by the user, who may continue in it."""
    parent, _, name = key.rpartition(".")
    return "${now:" in str(OmegaConf.select(config, parent)._get_node(name)._value())
