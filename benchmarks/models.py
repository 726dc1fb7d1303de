"""The models that the cases train."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from moe_plugin.apps.models import LanguageModel
from moe_plugin.experts import ExpertShape
from moe_plugin.routing import Router, Sigmoid

VOCABULARY, LENGTH = 256, 256


def tiny_model() -> LanguageModel:
    """Return the model of conf/model/tiny.yaml with conf/experts/16.yaml."""
    return _model(dim=128, num_layers=4, num_heads=4)


def small_model(**changes: Any) -> LanguageModel:
    """Return the model of conf/model/small.yaml with conf/experts/16.yaml."""
    return _model(**{"dim": 384, "num_layers": 8, "num_heads": 6, "num_dense": 1} | changes)


def billion_model(**changes: Any) -> LanguageModel:
    """Return a model of a billion parameters: 24 layers of 64 experts, 8 of them for each token."""
    sizes = {
        "vocab_size": 32768,
        "context_length": 1024,
        "dim": 768,
        "num_layers": 24,
        "num_heads": 12,
        "experts": ExpertShape(num_experts=64, top_k=8, hidden_dim=256),
    }
    return _model(**sizes | changes)


def random_tokens(sequences: int) -> torch.Tensor:
    """Return token ids of so many sequences, with their last targets."""
    return torch.randint(0, VOCABULARY, (sequences, LENGTH + 1))


def _model(**sizes: Any) -> LanguageModel:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "context_length": LENGTH,
        "router": partial(Router, score=Sigmoid(), normalize=True),
        "experts": ExpertShape(num_experts=16, top_k=2, hidden_dim=128),
    }
    return LanguageModel(**defaults | sizes)
