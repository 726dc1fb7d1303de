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
