"""How many experts tokens used on average, by layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_plugin.types import LoadRecord


class Used(NamedTuple):
    """Experts that tokens used in some steps.

    Attributes:
        experts_per_token: The mean by site; sites without tokens are left out.
        tokens: Tokens over all ranks.
    """

    experts_per_token: dict[str, float]
    tokens: int


class MeanExpertsPerToken:
    """Sums over steps, added without waiting for the device."""

    def __init__(self) -> None:
        """Start empty."""
        self._selections: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}

    def add_(self, record: LoadRecord) -> None:
        """Take in a step."""
        for name, counts_E in record.counts.items():
            self._selections[name] = self._selections.get(name, 0) + counts_E.sum()
            self._tokens[name] = self._tokens.get(name, 0) + record.tokens[name]

    def take(self) -> Used:
        """Return the means since the last call."""
        if not self._tokens:
            return Used({}, 0)
        names = list(self._tokens)
        counts = torch.stack([*self._selections.values(), *self._tokens.values()]).tolist()
        self._selections.clear()
        self._tokens.clear()
        selections, tokens = counts[: len(names)], counts[len(names) :]
        sums = zip(names, selections, tokens, strict=True)
        return Used({name: chosen / seen for name, chosen, seen in sums if seen}, max(tokens))
