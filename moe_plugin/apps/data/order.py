"""The order in which sequences are trained on: a function of seed and epoch alone, whatever the world size.

Legend: N sequences, B sequences of a micro-batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_plugin.errors import ConfigError


@dataclass(frozen=True)
class Share:
    """One rank's part of each global batch.

    Attributes:
        rank: This rank among the data-parallel ones.
        world_size: Number of data-parallel ranks.
        accumulation: Micro-batches per optimizer step.
    """

    rank: int = 0
    world_size: int = 1
    accumulation: int = 1

    def micro_batch(self, key: str, batch_size: int) -> int:
        """Return sequences per forward on this rank.

        Args:
            key: The setting that gives `batch_size`.
            batch_size: Sequences over all ranks and accumulated micro-batches.

        Raises:
            ConfigError: If ranks and accumulation do not divide `batch_size`.
        """
        parts = self.world_size * self.accumulation
        size, rest = divmod(batch_size, parts)
        if rest:
            rule = f"must be a multiple of ranks x accumulation ({self.world_size} x {self.accumulation} = {parts})"
            raise ConfigError(key, rule, batch_size, f"Use {size * parts or parts} or {(size + 1) * parts}.")
        return size


def shuffled(num_sequences: int, seed: int, epoch: int) -> Tensor:
    """Return the order of one epoch: int64 (N,), the same on every machine for the same arguments.

    Args:
        num_sequences: N.
        seed: Seed of the run.
        epoch: Each has another order.
    """
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(num_sequences, generator=generator)


class StepOrder:
    """The ids of this rank's micro-batches, with a position.

    Optimizer step i takes the i-th `batch_size` ids of the epoch's order; its micro-batches over ranks and
    accumulation are that step's consecutive slices. The last incomplete step of an epoch is dropped. Iterating
    continues at the current position, so a restored order continues with the next unseen batch; after an epoch's
    last batch, iterating again starts the next epoch.
    """

    def __init__(
        self, num_sequences: int, batch_size: int, order: Callable[[int], Tensor], share: Share
    ) -> None:
        """Start at epoch 0.

        Args:
            num_sequences: N.
            batch_size: Sequences per optimizer step over all ranks and accumulation.
            order: Epoch -> order of its sequences, int64 (N,).
            share: This rank's part.

        Raises:
            ConfigError: If `batch_size` is not divided by ranks x accumulation.
        """
        self.micro_batch = share.micro_batch("batch_size", batch_size)
        self.num_sequences, self.batch_size, self.order, self.share = num_sequences, batch_size, order, share
        self.epoch, self.position = 0, 0
        self._current = (-1, torch.empty(0, dtype=torch.int64))  # epoch and its order

    @property
    def sampler(self) -> StepOrder:
        """Where Lightning looks for `set_epoch` of a loader's `batch_sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`; stay in place when already in it (a resume in mid-epoch)."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    @property
    def sequences_seen(self) -> int:
        """Sequences of this epoch already given out, over all ranks."""
        return self.position * self.micro_batch * self.share.world_size

    def seek(self, epoch: int, sequences_seen: int) -> None:
        """Continue at another position.

        Args:
            epoch: Its epoch.
            sequences_seen: Sequences of the epoch before it, over all ranks.
        """
        self.epoch = epoch
        self.position = sequences_seen // (self.micro_batch * self.share.world_size)

    def __len__(self) -> int:
        """Return micro-batches of an epoch on this rank, the same on every rank."""
        return self.num_sequences // self.batch_size * self.share.accumulation

    def __iter__(self) -> Iterator[Tensor]:
        """Yield int64 (B,) from the current position to the end of the epoch."""
        if self.position >= len(self):
            self.set_epoch(self.epoch + 1)
        while self.position < len(self):
            ids_B = self._ids(self.position)
            self.position += 1
            yield ids_B

    def _ids(self, position: int) -> Tensor:
        if self._current[0] != self.epoch:
            self._current = (self.epoch, self.order(self.epoch))
        start = (position * self.share.world_size + self.share.rank) * self.micro_batch
        return self._current[1][start : start + self.micro_batch]
