"""Training text that changes its domain in the middle of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_plugin.apps.data.documents import sha256
from moe_plugin.apps.data.module import CorpusDataModule
from moe_plugin.errors import ConfigError


class DomainsInTurn(CorpusDataModule):
    """`CorpusDataModule` whose training batches are of one domain first, and then of another only."""

    def __init__(self, *, first: str, then: str, change_after: int, **settings: Any) -> None:
        """Take the domains; they are checked when the text has been read.

        Args:
            first: Domain at the start.
            then: Domain after the change.
            change_after: Optimizer steps with the first domain.
            **settings: Those of `CorpusDataModule`.
        """
        super().__init__(**settings)
        self.first, self.then, self.change_after = first, then, change_after

    def validate(self) -> None:
        """Check the domains too, and that the first one lasts until the change."""
        super().validate()
        self._order(len(self.train_sequences.domain), epoch=0)

    def _order(self, num_sequences: int, epoch: int) -> Tensor:
        order = super()._order(num_sequences, epoch)
        domain = self.train_sequences.domain[order]
        before, after = (order[domain == self._place(key)] for key in ("first", "then"))
        needed = self.change_after * self.batch_size
        if len(before) < needed:
            rule = f"must be <= {len(before) // self.batch_size}, as domain {self.first!r} has no more text"
            raise ConfigError("data.change_after", rule, self.change_after)
        return torch.cat([before[:needed], after])

    def _digest(self) -> str:
        return sha256(f"{super()._digest()} {(self.first, self.then, self.change_after)}")

    def _place(self, key: str) -> int:
        domain = getattr(self, key)
        if domain not in self.domains:
            raise ConfigError(f"data.{key}", f"must be one of {', '.join(self.domains)}", domain)
        return self.domains.index(domain)
