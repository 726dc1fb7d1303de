"""From a word on the command line to a model without storage, and its saved biases."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_plugin.apps.inspection.saved_biases import read_saved, saved_biases
from moe_plugin.apps.inspection.sites import Inspection, inspect_model
from moe_plugin.apps.received.local_checkpoint import local_checkpoint
from moe_plugin.apps.received.regular_file import read_json
from moe_plugin.apps.received.run_config import read_run_config
from moe_plugin.attach.verification.result import MODEL_ERRORS, first_line
from moe_plugin.errors import CheckpointError, ConfigError


def inspect_source(word: str, *, trusted: bool = False) -> Inspection:
    """Inspect what a word names.

    Args:
        word: A checkpoint of a run; `package.module:function` that returns a model; or a folder, a
            `config.json`, a model type or a name on the hub of transformers.
        trusted: The checkpoint and its run's configuration are the user's own: their code may run.

    Raises:
        ConfigError: If it names nothing that can be inspected.
        CheckpointError: The checkpoint cannot be read, or needs to be trusted.
    """
    if Path(word).suffix == ".ckpt":
        return _of_checkpoint(word, trusted=trusted)
    if ":" in word and not Path(word).exists():
        return inspect_model(_from_function(word))
    return _of_transformers(word)


def _of_checkpoint(word: str, *, trusted: bool) -> Inspection:
    """Inspect the model of a run's checkpoint, with the biases saved in it."""
    from omegaconf.errors import OmegaConfBaseException

    from moe_plugin.apps.launch.build import build_model_on_meta
    from moe_plugin.apps.launch.validate_config import USER_ERRORS

    path = local_checkpoint(word, "WHAT")
    source = path.parent.parent / "config.yaml"
    if not source.is_file():
        rule = "must be a checkpoint in a run's folder, two levels below its config.yaml"
        fix = "For your own model give 'package.module:function', or call inspect_model() on it."
        raise ConfigError("WHAT", rule, word, fix)
    fix = "If you wrote the file yourself, add --trust."
    config = read_run_config(source, trust=fix, trusted=trusted)
    try:
        inspection = inspect_model(build_model_on_meta(config))
    except (*USER_ERRORS, *MODEL_ERRORS, OmegaConfBaseException) as error:
        rule = f"must be in the folder of a run whose model can be built, got {first_line(error)}"
        raise ConfigError("WHAT", rule, word) from error
    return inspection.with_biases(saved_biases(read_saved(path, trusted=trusted), inspection))


def built_by(word: str) -> Any:
    """Return what the function that `package.module:function` names returns: its code runs.

    Raises:
        ConfigError: It cannot be imported, or raises an error.
    """
    build = _function_named(word)
    try:
        return build()
    except (*MODEL_ERRORS, OSError) as error:
        rule = f"must name a function that runs without arguments, got {first_line(error)}"
        raise ConfigError("WHAT", rule, word) from error


def _function_named(word: str) -> Callable[[], Any]:
    module, _, name = word.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        rule = "must name a function that can be imported"
        raise ConfigError("WHAT", rule, word, _reason(error)) from error


def _from_function(word: str) -> nn.Module:
    with torch.device("meta"):
        model = built_by(word)
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
            model = model_kind(config).from_config(config, trust_remote_code=False)
    except MODEL_ERRORS as error:
        rule = "must be of a type of transformers whose model can be built"
        raise ConfigError("WHAT", rule, word, _reason(error)) from error
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
        from huggingface_hub.errors import StrictDataclassError
        from transformers import CONFIG_MAPPING, AutoConfig
    except ImportError as error:
        fix = "Install transformers: pip install 'moe_plugin[hf]'."
        raise ConfigError("WHAT", "must be a checkpoint or package.module:function", word, fix) from error
    if word in CONFIG_MAPPING:
        return AutoConfig.for_model(word)
    for file in (Path(word), Path(word) / "config.json"):
        if file.exists() and not file.is_dir():
            read_json(file, "WHAT")
    try:
        return AutoConfig.from_pretrained(word, local_files_only=local_files_only, trust_remote_code=False)
    except (*MODEL_ERRORS, OSError, StrictDataclassError) as error:
        known = "a .ckpt file, package.module:function, or a folder, config.json, model type or name of transformers"
        raise ConfigError("WHAT", f"must be {known}", word, _reason(error)) from error


def _reason(error: Exception) -> str:
    """Return the first line of an error as a sentence."""
    return f"{(str(error) or type(error).__name__).splitlines()[0].rstrip('.')}."


def _stored_biases(folder: Path, inspection: Inspection) -> dict[str, Tensor]:
    wanted = {site.bias_key: site.name for site in inspection.sites if site.bias_key is not None}
    biases: dict[str, Tensor] = {}
    for path in sorted(each for each in folder.glob("*.safetensors") if each.is_file()):
        biases |= _biases_in(path, wanted)
    return inspection.fitting(biases)


def _biases_in(path: Path, wanted: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the tensors of a file whose names are keys of `wanted`, under the values."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {wanted[key]: file.get_tensor(key) for key in wanted.keys() & set(file.keys())}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged: {_reason(error)}") from error
