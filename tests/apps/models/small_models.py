"""Small language models for the tests of this folder."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from moe_plugin.apps.models import LanguageModel
from moe_plugin.experts import ExpertShape
from moe_plugin.routing import Router, Sigmoid

VOCAB_SIZE = 11


def language_model(score: Any = None, **changes: Any) -> LanguageModel:
    """Two layers, width 16; `changes` replace constructor arguments."""
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "context_length": 12,
        "dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "router": partial(Router, score=score or Sigmoid(), normalize=True),
        "experts": ExpertShape(num_experts=4, top_k=2, hidden_dim=8),
    }
    return LanguageModel(**(sizes | changes))


def token_batch(num_sequences: int, length: int = 12) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, VOCAB_SIZE, (num_sequences, length + 1))
    return {"tokens": tokens, "domain": torch.zeros(num_sequences, dtype=torch.long)}
