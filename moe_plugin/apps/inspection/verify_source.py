"""From a word on the command line to a small model with random inputs, and what the battery of checks finds in it.

Shape legend: B batch, S sequence, D model width.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_plugin.apps.inspection.inspect_source import built_by, config_of, model_kind
from moe_plugin.apps.inspection.shrink import shrink
from moe_plugin.attach.verification.battery import CheckResult, verify_model
from moe_plugin.attach.verification.result import MODEL_ERRORS, first_line
from moe_plugin.errors import ConfigError

BATCH, LENGTH = 2, 32
_OWN = "For another model give 'package.module:function' that returns it, or it and its inputs."


def verify_source(word: str) -> list[CheckResult]:
    """Run every check on a model with random inputs.

    Args:
        word: `package.module:function` that returns a model, or a model and its inputs; or a folder, a `config.json` or
            a model type of transformers, of which a small model with random weights is built.

    Raises:
        ConfigError: If it names nothing that can be built and run.
        AttachError: If the model has no routers that can be balanced.
    """
    torch.manual_seed(0)
    if word.endswith(".ckpt"):
        raise ConfigError("WHAT", "must not be a checkpoint with --verify", word, _OWN)
    built = built_by(word) if ":" in word else _small_of_transformers(word)
    model, inputs = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(model, nn.Module):
        fix = f"It returned {type(built).__name__}."
        raise ConfigError(
            "WHAT", "must name a function that returns a module, or one and its inputs", word, fix
        )
    return verify_model(model, _caller(inputs) if inputs is not None else _guessed(model, word))


def _small_of_transformers(word: str) -> nn.Module:
    """Build a small model of the type, with random weights."""
    config = config_of(word, local_files_only=True)
    try:
        model = model_kind(config).from_config(type(config).from_dict(shrink(config.to_dict())))
    except MODEL_ERRORS as error:
        rule = f"must be of a type of which a small model can be built, got {first_line(error)}"
        raise ConfigError("WHAT", rule, word, _OWN) from error
    _randomise_(model)
    return model


@torch.no_grad()
def _randomise_(model: nn.Module) -> None:
    """Give every matrix values, also those that a type leaves at zero."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.1)


def _caller(inputs: Any) -> Callable[[nn.Module], Any]:
    """Return a function that calls a model: mappings by keyword, tuples and lists by position."""
    if isinstance(inputs, Mapping):
        return lambda model: model(**inputs)
    args = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    return lambda model: model(*args)


def _guessed(model: nn.Module, word: str) -> Callable[[nn.Module], Any]:
    """Return a function that calls the model with the first guess that it takes."""
    errors: list[str] = []
    for inputs in _guesses(model):
        run = _caller(inputs)
        try:
            with torch.no_grad():
                run(copy.deepcopy(model))
        except MODEL_ERRORS as error:
            errors.append(first_line(error))
        else:
            return run
    rule = "must run on token ids (2, 32) or on hidden states (2, 32, width)"
    reason = f"It raised {errors[-1]}. " if errors else ""
    raise ConfigError("WHAT", rule, word, f"{reason}Let the function return (model, inputs).")


def _guesses(model: nn.Module) -> Iterator[Any]:
    embeddings = [part for part in model.modules() if isinstance(part, nn.Embedding)]
    if embeddings:
        ids_BS = torch.randint(embeddings[0].num_embeddings, (BATCH, LENGTH))
        taken = inspect.signature(model.forward).parameters
        extra: dict[str, Any] = {"use_cache": False} if "use_cache" in taken else {}
        if "decoder_input_ids" in taken:
            extra["decoder_input_ids"] = ids_BS.flip(1)
        yield {"input_ids": ids_BS, **extra} if "input_ids" in taken else ids_BS
    yield from _hidden_states(model)


def _hidden_states(model: nn.Module) -> Iterator[Tensor]:
    widths = [parameter.shape[-1] for parameter in model.parameters() if parameter.dim() > 1]
    if widths:
        yield torch.randn(BATCH, LENGTH, widths[0])
        yield torch.randn(BATCH * LENGTH, widths[0])
