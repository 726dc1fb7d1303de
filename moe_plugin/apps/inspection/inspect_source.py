"""From a word on the command line to a model without storage, and its saved biases."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_plugin.apps.inspection.sites import Inspection, inspect_model
from moe_plugin.errors import ConfigError


def inspect_source(word: str) -> Inspection:
    """Inspect what a word names.

    Args:
        word: A checkpoint of a run; `package.module:function` that returns a model; or a folder, a
            `config.json`, a model type or a name on the hub of transformers.

    Raises:
        ConfigError: If it names nothing that can be inspected.
    """
    if Path(word).suffix == ".ckpt":
        return _of_checkpoint(Path(word))
    if ":" in word:
        return inspect_model(_from_function(word))
    return _of_transformers(word)


def _of_checkpoint(path: Path) -> Inspection:
    """Inspect the model of a run's checkpoint, with the biases saved in it."""
    from omegaconf import DictConfig, OmegaConf

    from moe_plugin.apps.launch.build import build_model_on_meta

    source = path.resolve().parent.parent / "config.yaml"
    if not path.is_file() or not source.is_file():
        rule = "must be a checkpoint file in a run's folder, two levels below its config.yaml"
        fix = "For your own model give 'package.module:function', or call inspect_model() on it."
        raise ConfigError("WHAT", rule, str(path), fix)
    config = OmegaConf.load(source)
    assert isinstance(config, DictConfig)
    inspection = inspect_model(build_model_on_meta(config))
    return inspection.with_biases(saved_biases(_read_checkpoint(path), inspection))


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """Return what Lightning saved, its tensors still on disk; like any such checkpoint it may run code."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ConfigError("WHAT", "must be a Lightning checkpoint", str(path), _reason(error)) from error


def saved_biases(checkpoint: Mapping[str, Any], inspection: Inspection) -> dict[str, Tensor]:
    """Return the bias of each router, from the balancing callback's state or the model's own weights.

    Args:
        checkpoint: What Lightning saved.
        inspection: The routers.
    """
    weights = checkpoint.get("state_dict", {})
    biases = {site.name: weights[site.bias_key] for site in inspection.sites if site.bias_key in weights}
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, Mapping) and "sites" in state:
            biases |= {name: saved["bias"] for name, saved in state["sites"].items()}
    return biases


def function_named(word: str) -> Callable[[], Any]:
    """Return the function that `package.module:function` names.

    Raises:
        ConfigError: If it cannot be imported.
    """
    module, _, name = word.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            "WHAT", "must name a function that can be imported", word, _reason(error)
        ) from error


def _from_function(word: str) -> nn.Module:
    build = function_named(word)
    with torch.device("meta"):
        model = build()
    if isinstance(model, tuple) and len(model) == 2:  # the model and its inputs, for --verify
        model = model[0]
    if not isinstance(model, nn.Module):
        fix = f"It returned {type(model).__name__}."
        raise ConfigError("WHAT", "must name a function that returns a module", word, fix)
    return model


def _of_transformers(word: str) -> Inspection:
    """Inspect a model of transformers from its configuration, with the biases of a folder's safetensors files."""
    config = config_of(word)
    try:
        with torch.device("meta"):
            model = model_kind(config).from_config(config)
    except ValueError as error:
        raise ConfigError("WHAT", "must have a model class in transformers", word, _reason(error)) from error
    inspection = inspect_model(model)
    folder = Path(word)
    return inspection.with_biases(_stored_biases(folder, inspection)) if folder.is_dir() else inspection


def model_kind(config: Any) -> Any:
    """Return the class of transformers that builds a model of this configuration."""
    from transformers import AutoModel, AutoModelForCausalLM

    return AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel


def config_of(word: str, *, local_files_only: bool = False) -> Any:
    """Return a configuration of transformers.

    Args:
        word: A folder, a `config.json`, a model type, or a name on the hub.
        local_files_only: Download nothing.

    Raises:
        ConfigError: If there is none, or transformers is not installed.
    """
    try:
        from transformers import CONFIG_MAPPING, AutoConfig
    except ImportError as error:
        fix = "Install transformers: pip install 'moe_plugin[hf]'."
        raise ConfigError("WHAT", "must be a checkpoint or package.module:function", word, fix) from error
    if word in CONFIG_MAPPING:
        return AutoConfig.for_model(word)
    try:
        return AutoConfig.from_pretrained(word, local_files_only=local_files_only)
    except (OSError, ValueError) as error:
        known = "a .ckpt file, package.module:function, or a folder, config.json, model type or name of transformers"
        raise ConfigError("WHAT", f"must be {known}", word, _reason(error)) from error


def _reason(error: Exception) -> str:
    """Return the first line of an error as a sentence."""
    return f"{(str(error) or type(error).__name__).splitlines()[0].rstrip('.')}."


def _stored_biases(folder: Path, inspection: Inspection) -> dict[str, Tensor]:
    from safetensors import safe_open

    wanted = {site.bias_key: site.name for site in inspection.sites if site.bias_key is not None}
    biases: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            biases |= {wanted[key]: file.get_tensor(key) for key in wanted.keys() & set(file.keys())}
    return biases
