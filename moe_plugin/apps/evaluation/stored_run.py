"""The configuration with which a checkpoint is evaluated: its run's, which may be received, and the user's words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from moe_plugin.apps.config_folder import conf_dir
from moe_plugin.apps.launch.signature import unknown_key
from moe_plugin.apps.received.local_checkpoint import local_checkpoint
from moe_plugin.apps.received.run_config import read_run_config
from moe_plugin.errors import ConfigError

CONFIG_FILE = "config.yaml"
TRUST = "trust"
_SECTIONS = ("model", "data", "trainer", "callbacks", "logger")
_NEEDED = ("name", "seed", "optimized_metric", "paths", "model", "data", "trainer")


def evaluated_config(changes: Mapping[str, Any], *, trusted: bool) -> DictConfig:
    """Return the configuration of a checkpoint's run with the given keys changed.

    Args:
        changes: The user's values by key, ``ckpt_path`` among them; they may name anything.
        trusted: The run is the user's own: its configuration may name anything, too.

    Raises:
        ConfigError: There is no such checkpoint or run, a key is unknown, or the configuration needs to be trusted.
    """
    checkpoint = local_checkpoint(changes.get("ckpt_path"), "ckpt_path")
    source = run_folder(checkpoint) / CONFIG_FILE
    if not source.exists():
        rule = f"must be in a run's folder, next to its {CONFIG_FILE}"
        raise ConfigError("ckpt_path", rule, changes["ckpt_path"])
    fix = f"If you wrote the file yourself, add {TRUST}=true."
    config = read_run_config(source, trust=fix, trusted=trusted, replaced=changes)
    _check_sections(config, source)
    config = _validating(config, trusted=trusted)
    for key, value in changes.items():
        if key != "ckpt_path":
            _change_(config, key, value)
    _check_sections(config, source)
    for key in _NEEDED:
        if config.get(key) is None:
            raise ConfigError(key, "must be there, as in a run's configuration", fix=f"See {source}.")
    config.ckpt_path, config.count_only, config.trust = str(checkpoint), False, trusted
    return config


def run_folder(checkpoint: Path) -> Path:
    """Return the folder of the run that made a checkpoint; links are not followed out of it."""
    return checkpoint.parent.parent


def _check_sections(config: DictConfig, source: Path) -> None:
    for key in _SECTIONS:
        if not isinstance(value := config.get(key), (DictConfig, type(None))):
            raise ConfigError(key, "must be settings with names", value, f"See {source}.")


def _validating(config: DictConfig, *, trusted: bool) -> DictConfig:
    """Return the configuration for one process that only validates.

    Unless it is trusted, what a validation does without is taken out, so no setting of it can name a file or an
    address: caches, loggers and profilers of the machine where the run was, and callbacks that are not ours.
    """
    usual = OmegaConf.load(conf_dir() / "trainer" / "default.yaml")
    trainer = OmegaConf.merge(usual, config.get("trainer") or {}, {"num_nodes": 1})
    assert isinstance(trainer, DictConfig)
    whole = config.copy()
    whole.trainer = trainer
    callbacks = (config.get("callbacks") or {}).items()
    if not trusted:
        whole.logger = None
        whole.trainer = {name: trainer[name] for name in map(str, usual)} | {"profiler": None}
        callbacks = [(name, node if _is_ours(node) else None) for name, node in callbacks]
        if "cache" in (config.get("data") or {}):
            whole.data.cache = None
    whole.callbacks = dict(callbacks)
    whole.strategy = {"devices": 1, "lightning": "auto"}
    return whole


def _is_ours(node: Any) -> bool:
    return isinstance(node, DictConfig) and str(node.get("_target_")).startswith("moe_plugin.callbacks.")


def _change_(config: DictConfig, key: str, value: object) -> None:
    """Give a key another value."""
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    if not isinstance(node, DictConfig) or name not in node:
        raise unknown_key(key, value, list(node) if isinstance(node, DictConfig) else [])
    OmegaConf.update(config, key, value)
