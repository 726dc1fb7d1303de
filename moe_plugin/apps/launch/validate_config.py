"""Checks a composed configuration before anything is created: types, values, files, and that it can be built."""

from __future__ import annotations

import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

from hydra.errors import InstantiationException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from torch import nn

from moe_plugin.apps.launch.build import (
    LOSS_FREE,
    build_callbacks,
    build_data,
    build_model_on_meta,
    build_trainer,
)
from moe_plugin.apps.launch.checkpoint_fits import check_checkpoint_fits
from moe_plugin.apps.launch.compose import without_hydra
from moe_plugin.apps.launch.config_nodes import check_nodes
from moe_plugin.apps.launch.expert_parallel import check_experts
from moe_plugin.apps.launch.explain_config_error import locate
from moe_plugin.apps.launch.fused_experts import check_fused_experts
from moe_plugin.apps.launch.last_checkpoint import LAST
from moe_plugin.apps.launch.processes import check_processes, number_of_processes
from moe_plugin.apps.launch.quiet_logs import quiet
from moe_plugin.apps.launch.resumed_end import check_trains
from moe_plugin.apps.launch.resumed_settings import check_resume
from moe_plugin.checkpoints.verified_io import is_remote
from moe_plugin.errors import ConfigError
from moe_plugin.number_checks import check_positive_integers

USER_ERRORS = (InstantiationException, MisconfigurationException, ValueError, TypeError, ImportError, OSError)


def check(config: DictConfig) -> None:
    """Check a run's configuration, once `check_early` has, without creating anything.

    Args:
        config: As composed; its interpolations may be unresolved.

    Raises:
        ConfigError: A value is not allowed; it names the full key.
    """
    check_nodes(config)
    run = without_hydra(config, Path(config.paths.runs, config.name))
    if run.count_only:
        return
    _check_batch(run)
    elsewhere = _runs_elsewhere(config)
    if not elsewhere:
        check_processes(run)
    with quiet():
        for key, build in BUILDERS.items():
            if not (elsewhere and key == "trainer"):
                attempt(build, run, config, key)
        model = build_model_on_meta(run)
        _check_sites(run, model)
        if run.ckpt_path not in (None, LAST) and not is_remote(run.ckpt_path):
            check_checkpoint_fits(model, run.ckpt_path, trusted=run.trust)


def check_training(config: DictConfig) -> None:
    """Check that a run has something to train, and that its settings fit the checkpoint that it continues from.

    Raises:
        ConfigError: They do not; it names the full key.
    """
    run = without_hydra(config, Path(config.paths.runs, config.name))
    if run.count_only:
        return
    with quiet():
        if run.ckpt_path not in (None, LAST) and not is_remote(run.ckpt_path):
            check_resume(run)
        check_trains(run)


def check_data(config: DictConfig) -> None:
    """Check a run's text; nothing is created but the cache, which the run then reads.

    Args:
        config: As composed and checked.

    Raises:
        ConfigError: The text cannot be read or is too short, or the cache cannot be written.
    """
    run = without_hydra(config, Path(config.paths.runs, config.name))
    if not (run.count_only or _runs_elsewhere(config)):
        with quiet():
            attempt(lambda run: build_data(run).prepare_data(), run, config, "data")


def _runs_elsewhere(config: DictConfig) -> bool:
    """Return whether jobs run on other machines than this one, through submitit."""
    return "submitit" in str(OmegaConf.select(config, "hydra.launcher._target_"))


def _check_sites(run: DictConfig, model: nn.Module) -> None:
    """Check that the globs that choose routers match anything in the model."""
    key = f"callbacks.{LOSS_FREE}.sites"
    sites = OmegaConf.select(run, key)
    for glob in [sites] if isinstance(sites, str) else sites or ():
        if not any(fnmatchcase(name, glob) for name, _ in model.named_modules()):
            raise ConfigError(key, "must match the name of a module", glob, "moe-inspect shows the routers.")


def _check_batch(run: DictConfig) -> None:
    """Check that a global batch divides into equal micro-batches."""
    factors = {
        "strategy.devices": number_of_processes(run),
        "trainer.num_nodes": run.trainer.num_nodes,
        "trainer.accumulate_grad_batches": run.trainer.accumulate_grad_batches,
    }
    # Ranks that split the computation of the same tokens share their part of the batch.
    sharing = run.strategy.get("tensor_parallel_size", 1)
    check_positive_integers(**factors, **{"strategy.tensor_parallel_size": sharing})
    for key in ("batch_size", "val_batch_size"):
        parts = max(1, math.prod(factors.values()) // sharing)
        if (size := run.data.get(key) or 0) % parts:
            product = f"{' x '.join(factors)} ({' x '.join(map(str, factors.values()))} = {parts})"
            raise ConfigError(f"data.{key}", f"must be a multiple of {product}", size)
        factors.pop("trainer.accumulate_grad_batches", None)  # only training accumulates


def attempt(build: Callable[[DictConfig], object], run: DictConfig, config: DictConfig, key: str) -> None:
    """Build a part to see whether it can be built.

    Args:
        build: Builds the part.
        run: The run's own configuration.
        config: The configuration in which an error's key is looked up.
        key: The part's.

    Raises:
        ConfigError: It cannot; the error names the full key.
    """
    try:
        build(run)
    except USER_ERRORS as error:
        raise locate(error, config, near=key) from error


BUILDERS: dict[str, Callable[[DictConfig], object]] = {
    "callbacks": build_callbacks,
    "trainer": lambda run: build_trainer(run, logger=False, callbacks=build_callbacks(run)),
    "data": build_data,
    "model": build_model_on_meta,
    "strategy": check_experts,
    f"callbacks.{LOSS_FREE}": check_fused_experts,
}
