"""Find every transformers family with routed experts, and build a small model of each from its config."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moe_plugin.apps.inspection.shrink import shrink
from tests.families.overrides import MODEL_CLASSES, OVERRIDES

_MODELS = Path(transformers.__path__[0]) / "models"
_FIELD_OF_EXPERTS = re.compile(r"^\s+[\"']?\w*experts\w*[\"']?\s*[:=]", re.MULTILINE)
_PREFERRED = ("ForConditionalGeneration", "ForCausalLM", "ForBlockDiffusion", "Model")


@cache
def families() -> list[str]:
    """Return the names of the families that have a config with a field that names experts."""
    configs = sorted(_MODELS.glob("*/configuration_*.py"))
    return sorted({path.parent.name for path in configs if _FIELD_OF_EXPERTS.search(path.read_text())})


def build(family: str) -> PreTrainedModel:
    """Build a small model of the family with random weights, in training mode: its first class that works."""
    failures = []
    for kind, config_kind in _model_classes(family):
        try:
            model = _built(kind, config_kind, family)
        except (
            TypeError,
            ValueError,
            AttributeError,
            RuntimeError,
            LookupError,
            AssertionError,
            StrictDataclassError,
        ) as error:
            failures.append(f"{kind.__name__}: {error!r}")
            continue
        if any("expert" in name or "MoE" in type(part).__name__ for name, part in model.named_modules()):
            return model
        failures.append(f"{kind.__name__}: has no experts")
    raise AssertionError(f"no model of {family} can be built: {failures}")


def _built(kind: Any, config_kind: type[PretrainedConfig], family: str) -> PreTrainedModel:
    fields = shrink(config_kind().to_dict())
    for path, value in OVERRIDES.get(family, {}).items():
        _set(fields, path, value)
    config = config_kind.from_dict(fields)
    torch.manual_seed(0)
    model = kind._from_config(config) if kind is not AutoModelForCausalLM else kind.from_config(config)
    _randomise_(model)
    return model.train()


@torch.no_grad()
def _randomise_(model: nn.Module) -> None:
    """Give every matrix values, also those that a family leaves at zero or without any."""
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.numel() > max(parameter.shape):
            parameter.normal_(0, 0.1)
        elif not parameter.isfinite().all() or parameter.abs().max() > 100:
            parameter.zero_()


def _set(fields: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        # A family's text model takes the text config itself.
        fields = fields if parent == "text_config" and parent not in fields else fields.setdefault(parent, {})
    fields[last] = value


def _model_classes(family: str) -> Iterator[tuple[Any, type[PretrainedConfig]]]:
    if family in MODEL_CLASSES:
        kinds = [getattr(transformers, name) for name in MODEL_CLASSES[family]]
        yield from ((kind, kind.config_class) for kind in kinds)
    elif not (_MODELS / family / f"modeling_{family}.py").exists():
        assert family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, f"{family} has no model"
        yield AutoModelForCausalLM, CONFIG_MAPPING[family]
    else:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        kinds = [kind for kind in vars(module).values() if _is_model_of(kind, module.__name__)]
        yield from ((kind, kind.config_class) for kind in sorted(kinds, key=_rank))


def _is_model_of(kind: Any, module: str) -> bool:
    is_class = inspect.isclass(kind) and issubclass(kind, PreTrainedModel) and kind.__module__ == module
    return is_class and "forward" in vars(kind)


def _rank(kind: type) -> tuple[int, int]:
    names = (number for number, name in enumerate(_PREFERRED) if kind.__name__.endswith(name))
    return next(names, len(_PREFERRED)), len(kind.__name__)
