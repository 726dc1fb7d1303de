"""Checks a composed configuration before anything is created: types, values, files, and that it can be built."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf, open_dict

from moe_plugin.apps.launch.build import (
    LOSS_FREE,
    build_callbacks,
    build_data,
    build_model_on_meta,
    build_trainer,
)
from moe_plugin.apps.launch.checkpoint_experts import check_checkpoint_experts
from moe_plugin.apps.launch.config_schema import Paths, Settings, Strategy
from moe_plugin.apps.launch.expert_parallel import check_experts
from moe_plugin.apps.launch.explain_config_error import locate, one_line
from moe_plugin.apps.launch.fused_experts import check_fused_experts
from moe_plugin.apps.launch.last_checkpoint import LAST
from moe_plugin.apps.launch.processes import check_processes, number_of_processes
from moe_plugin.apps.launch.quiet_logs import quiet
from moe_plugin.apps.launch.resumed_end import check_trains
from moe_plugin.apps.launch.resumed_settings import check_resume
from moe_plugin.apps.launch.signature import check_arguments
from moe_plugin.apps.report.sweep import MEASURES
from moe_plugin.checkpoints.verified_io import is_remote
from moe_plugin.errors import ConfigError
from moe_plugin.number_checks import check_positive_integers

USER_ERRORS = (InstantiationException, MisconfigurationException, ValueError, TypeError, ImportError, OSError)


def without_hydra(config: DictConfig, output: Path) -> DictConfig:
    """Return the run's own configuration, resolved.

    Args:
        config: As composed, with the ``hydra`` node.
        output: The run's folder.
    """
    run = OmegaConf.masked_copy(config, [key for key in map(str, config) if key != "hydra"])
    with open_dict(run):
        run.paths.output = str(output)
    OmegaConf.resolve(run)
    return run


def check(config: DictConfig) -> None:
    """Check a run's configuration without creating anything.

    Args:
        config: As composed; its interpolations may be unresolved.

    Raises:
        ConfigError: A value is not allowed; it names the full key.
    """
    _check_types(config)
    run = without_hydra(config, Path(config.paths.runs, config.name))
    if run.count_only:
        return
    if run.optimized_metric not in MEASURES:
        raise ConfigError("optimized_metric", f"must be one of {', '.join(MEASURES)}", run.optimized_metric)
    _check_missing(run)
    _check_checkpoint(run.ckpt_path, run.trust)
    _check_end(run)
    _check_batch(run)
    elsewhere = _runs_elsewhere(config)
    if not elsewhere:
        check_processes(run)
    with quiet():
        for key, build in BUILDERS.items():
            if not (elsewhere and key == "trainer"):
                attempt(build, run, config, key)
        if run.ckpt_path not in (None, LAST) and not is_remote(run.ckpt_path):
            check_checkpoint_experts(build_model_on_meta(run), run.ckpt_path, trusted=run.trust)
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


def _check_types(config: DictConfig) -> None:
    """Check every key and scalar against what takes it."""
    groups = {"strategy": Strategy, "paths": Paths}
    if OmegaConf.is_list(config.strategy.devices):
        given, fix = list(config.strategy.devices), "CUDA_VISIBLE_DEVICES picks GPUs."
        raise ConfigError("strategy.devices", "must be a whole number or 'auto'", given, fix)
    settings = {field.name: config[field.name] for field in dataclasses.fields(Settings)}
    check_arguments(Settings, settings, "")
    for key, schema in groups.items():
        check_arguments(schema, present(config[key]), key)
    for key, node in nodes(config):
        check_arguments(locate_target(node, key), present(node), key)


def nodes(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Yield the full key and node of everything with a ``_target_``; what interpolations point to comes once.

    Args:
        config: The configuration.
        prefix: Put before each key.
    """
    for name in map(str, config):
        key = f"{prefix}{name}"
        if OmegaConf.is_interpolation(config, name) or OmegaConf.is_missing(config, name) or key == "hydra":
            continue
        node = config[name]
        if isinstance(node, DictConfig):
            if "_target_" in node:
                yield key, node
            yield from nodes(node, f"{key}.")


def present(node: DictConfig) -> Mapping[str, Any]:
    """Return the values of a node that are filled in and that can be resolved without a run."""
    waits = [name for name in node if "paths.output" in str(node._get_node(name))]
    return {str(n): node[n] for n in node if not OmegaConf.is_missing(node, n) and n not in waits}


def locate_target(node: DictConfig, key: str) -> Callable[..., Any]:
    """Return what a node's ``_target_`` names.

    Args:
        node: The node.
        key: Its full key.

    Raises:
        ConfigError: It cannot be imported.
    """
    try:
        module, _, name = node._target_.rpartition(".")
        return getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        rule = f"must name a class or function that can be imported ({one_line(str(error))})"
        raise ConfigError(f"{key}._target_", rule, node._target_) from error


def _check_missing(run: DictConfig) -> None:
    """Check that what an option leaves open is given."""
    for key in sorted(OmegaConf.missing_keys(run)):
        raise ConfigError(key, "must be given", fix=f"Add {key}=VALUE.")


def _check_checkpoint(path: str | None, trusted: bool) -> None:
    """Check that the checkpoint to continue from exists; a run's own last one may come later."""
    if path in (None, LAST):
        return
    if is_remote(path):
        if not trusted:
            raise ConfigError("ckpt_path", "must be a local path", path, "Of a URL of your own: trust=true.")
    elif not Path(path).exists():
        raise ConfigError("ckpt_path", f"must be an existing checkpoint or '{LAST}'", path)


def _check_end(run: DictConfig) -> None:
    """Check that training ends: the learning rate decays over a known number of steps."""
    if run.trainer.max_steps < 1 and (run.trainer.max_epochs or 0) < 1:
        rule, fix = "must be >= 1 unless trainer.max_epochs is", "trainer.max_time can end a run before."
        raise ConfigError("trainer.max_steps", rule, run.trainer.max_steps, fix)


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
