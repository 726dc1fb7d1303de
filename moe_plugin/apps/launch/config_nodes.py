"""The parts of a configuration that name a class or function in ``_target_``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from moe_plugin.apps.launch.explain_config_error import one_line
from moe_plugin.apps.launch.signature import check_arguments, check_parameters
from moe_plugin.apps.launch.source_signature import parameters_in_source
from moe_plugin.errors import ConfigError


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


def check_nodes_in_source(config: DictConfig) -> None:
    """Check every key and scalar against the source of what takes it; nothing is imported.

    Raises:
        ConfigError: One does not fit. What the source does not show passes.
    """
    for key, node in nodes(config):
        if isinstance(node._target_, str) and (parameters := parameters_in_source(node._target_)) is not None:
            check_parameters(parameters, present(node), key)


def check_nodes(config: DictConfig) -> None:
    """Check every key and scalar against what takes it, which is imported for that.

    Raises:
        ConfigError: One does not fit, or a class cannot be imported.
    """
    for key, node in nodes(config):
        check_arguments(_locate_target(node, key), present(node), key)


def _locate_target(node: DictConfig, key: str) -> Callable[..., Any]:
    """Return what a node's ``_target_`` names."""
    try:
        module, _, name = node._target_.rpartition(".")
        return getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        rule = f"must name a class or function that can be imported ({one_line(str(error))})"
        raise ConfigError(f"{key}._target_", rule, node._target_) from error
