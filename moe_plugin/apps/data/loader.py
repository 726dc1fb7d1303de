"""Batches from memory.

The loaders are plain iterables: Lightning injects its `DistributedSampler` into a `DataLoader` only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moe_plugin.apps.data.order import Share, StepOrder, shuffled
from moe_plugin.apps.data.sequences import Sequences
from moe_plugin.errors import ConfigError

Batch = dict[str, Tensor]


class TrainingLoader:
    """Stateful batches in the order of `batch_sampler`.

    Lightning saves the state with its fit loop (it looks for `state_dict` on the loader), so a run resumed at a
    step boundary continues with the next unseen batch, at any world size.
    """

    def __init__(self, sequences: Sequences, batch_sampler: StepOrder, digest: str) -> None:
        """Create the training loader.

        Args:
            sequences: What to train on.
            batch_sampler: Which ids come when.
            digest: Identifies the corpus and its order; the state of another is refused in mid-epoch.
        """
        self.sequences, self.batch_sampler, self.digest = sequences, batch_sampler, digest

    def __len__(self) -> int:
        """Return micro-batches of an epoch."""
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from the current position to the end of the epoch."""
        for ids_B in self.batch_sampler:
            yield self.sequences.batch(ids_B)

    def state_dict(self) -> dict[str, Any]:
        """Return the position, in units that do not depend on ranks or accumulation."""
        order = self.batch_sampler
        return {"epoch": order.epoch, "sequences_seen": order.sequences_seen, "digest": self.digest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            ConfigError: If it is in mid-epoch of other data.
        """
        if state_dict["sequences_seen"] and state_dict["digest"] != self.digest:
            settings = "source, Python, tokenizer, context_length, batch_size, seed and max_train_tokens"
            rule = f"must be the checkpoint's, which stopped in the middle of epoch {state_dict['epoch']}"
            raise ConfigError("data", rule, fix=f"Resume with the same {settings}, or load the weights only.")
        self.batch_sampler.seek(state_dict["epoch"], state_dict["sequences_seen"])


class ValidationLoader:
    """All sequences once, in one fixed mixed order; every rank has equally many whole batches."""

    def __init__(self, sequences: Sequences, batch_size: int, share: Share) -> None:
        """Create the validation loader.

        Args:
            sequences: What to validate on; their number must be a multiple of `batch_size`.
            batch_size: Sequences per batch over all ranks.
            share: This rank's part; accumulation plays no role.

        Raises:
            ConfigError: If the ranks do not divide `batch_size`.
        """
        self.sequences = sequences
        self.micro_batch = Share(share.rank, share.world_size).micro_batch("val_batch_size", batch_size)
        # Mixed, so the first batches (a sanity check, limit_val_batches) already hold every domain.
        steps = shuffled(len(sequences.domain), seed=0, epoch=0).view(-1, share.world_size, self.micro_batch)
        self.ids_NB = steps[:, share.rank]

    def __len__(self) -> int:
        """Return batches on this rank, the same on every rank."""
        return len(self.ids_NB)

    def __iter__(self) -> Iterator[Batch]:
        """Yield every batch of this rank."""
        for ids_B in torch.unbind(self.ids_NB):
            yield self.sequences.batch(ids_B)
