"""Checks a composed configuration before anything is created: types, values, files, and that it can be built."""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf, open_dict

from moe_plugin.apps.launch.build import build_callbacks, build_data, build_model_on_meta, build_trainer
from moe_plugin.apps.launch.checkpoint_experts import check_checkpoint_experts
from moe_plugin.apps.launch.expert_parallel import check_experts
from moe_plugin.apps.launch.explain import locate, one_line
from moe_plugin.apps.launch.fused_experts import check_fused_experts
from moe_plugin.apps.launch.last_checkpoint import LAST
from moe_plugin.apps.launch.processes import check_processes, number_of_processes
from moe_plugin.apps.launch.quiet_logs import quiet
from moe_plugin.apps.launch.schema import Paths, Settings, Strategy
from moe_plugin.apps.launch.signature import check_arguments
from moe_plugin.errors import ConfigError, MoEPluginError

USER_ERRORS = (MoEPluginError, MisconfigurationException, ValueError, TypeError, ImportError, OSError)


def without_hydra(config: DictConfig, output: Path) -> DictConfig:
    """Return the run's own configuration, resolved, with its folder filled in."""
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
        ConfigError: Names the key, the value and what is allowed.
    """
    check_types(config)
    run = without_hydra(config, Path(config.paths.runs, config.name))
    if run.count_only:
        return
    check_missing(run)
    check_checkpoint(run.ckpt_path)
    check_end(run)
    check_batch(run)
    elsewhere = is_for_a_queue(config)
    if not elsewhere:
        check_processes(run)
    with quiet():
        for key, build in BUILDERS.items():
            if not (elsewhere and key == "trainer"):
                attempt(build, run, config, key)
        if run.ckpt_path not in (None, LAST):
            check_checkpoint_experts(build_model_on_meta(run), run.ckpt_path)


def is_for_a_queue(config: DictConfig) -> bool:
    """Return whether jobs will run on other machines than this one, through submitit."""
    return "submitit" in str(OmegaConf.select(config, "hydra.launcher._target_"))


def check_types(config: DictConfig) -> None:
    """Check every key and scalar against what takes it."""
    groups = {"strategy": Strategy, "paths": Paths}
    if OmegaConf.is_list(config.strategy.devices):
        raise ConfigError(
            f"'strategy.devices' must be a whole number or 'auto', got {config.strategy.devices}; "
            "CUDA_VISIBLE_DEVICES picks GPUs."
        )
    settings = {field.name: config[field.name] for field in dataclasses.fields(Settings)}
    check_arguments(Settings, settings, "")
    for key, schema in groups.items():
        check_arguments(schema, present(config[key]), key)
    for key, node in nodes(config):
        check_arguments(locate_target(node, key), present(node), key)


def nodes(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Yield the full key and node of everything with a ``_target_``; what interpolations point to comes once."""
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
    return {
        str(name): node[name]
        for name in node
        if not OmegaConf.is_missing(node, name) and not nested(node, name)
    }


def nested(node: DictConfig, name: Any) -> bool:
    """Return whether a value waits for the run's own folder."""
    return "paths.output" in str(node._get_node(name))


def locate_target(node: DictConfig, key: str) -> Callable[..., Any]:
    """Return what a node's ``_target_`` names."""
    try:
        module, _, name = node._target_.rpartition(".")
        return getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"'{key}._target_' must name a class or function that can be imported, got {node._target_!r}: "
            f"{one_line(str(error))}"
        ) from error


def check_missing(run: DictConfig) -> None:
    """Check that what an option leaves open is given."""
    for key in sorted(OmegaConf.missing_keys(run)):
        raise ConfigError(f"'{key}' must be given: {key}=...")


def check_checkpoint(path: str | None) -> None:
    """Check that the checkpoint to go on from is there; a run's own last one may be still to come."""
    if path not in (None, LAST) and not Path(path).exists():
        raise ConfigError(f"'ckpt_path' must be an existing checkpoint or '{LAST}', got {path!r}.")


def check_end(run: DictConfig) -> None:
    """Check that training ends: the learning rate decays over a known number of steps."""
    if run.trainer.max_steps < 1 and run.trainer.max_epochs < 1:
        raise ConfigError(
            f"'trainer.max_steps' must be >= 1 unless trainer.max_epochs is, got {run.trainer.max_steps}; "
            "trainer.max_time can end a run before."
        )


def check_batch(run: DictConfig) -> None:
    """Check that a global batch divides into equal micro-batches."""
    factors = {
        "strategy.devices": number_of_processes(run),
        "trainer.num_nodes": run.trainer.num_nodes,
        "trainer.accumulate_grad_batches": run.trainer.accumulate_grad_batches,
    }
    for key, value in factors.items():
        if value < 1:
            raise ConfigError(f"'{key}' must be >= 1, got {value}.")
    # Ranks that split the computation of the same tokens share their part of the batch.
    parts = max(1, math.prod(factors.values()) // run.strategy.get("tensor_parallel_size", 1))
    if run.data.batch_size % parts:
        raise ConfigError(
            f"'data.batch_size' must be a multiple of {' x '.join(factors)} "
            f"({' x '.join(map(str, factors.values()))} = {parts}), got {run.data.batch_size}."
        )


def attempt(build: Callable[[DictConfig], object], run: DictConfig, config: DictConfig, key: str) -> None:
    """Build a part to see whether it can be built; what goes wrong names the key."""
    try:
        build(run)
    except InstantiationException as error:
        found = re.search(r"full_key: (\S+)", str(error))
        cause = one_line(str(error.__cause__ or error))
        raise ConfigError(locate(cause, config, near=found[1] if found else key)) from error
    except USER_ERRORS as error:
        raise ConfigError(locate(one_line(str(error)), config, near=key)) from error


BUILDERS: dict[str, Callable[[DictConfig], object]] = {
    "callbacks": build_callbacks,
    "trainer": lambda run: build_trainer(run, logger=False, callbacks=build_callbacks(run)),
    "data": build_data,
    "model": build_model_on_meta,
    "strategy": check_experts,
    "balancing.callback": check_fused_experts,
}
