"""A plugin for Lightning's Trainer that saves checkpoints whole and verifies them when they are loaded."""

from __future__ import annotations

import hashlib
import os
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from moe_plugin.checkpoints.manifest import file_sum, verify
from moe_plugin.checkpoints.replace import discard, previous_of, put
from moe_plugin.checkpoints.safe_load import load_file
from moe_plugin.checkpoints.sharded import is_sharded, read_sharded
from moe_plugin.checkpoints.temporary import temporary_file, write
from moe_plugin.errors import CheckpointError


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are whole or not there, also after SIGKILL, a full disk or a flipped bit.

    A checkpoint is written into a temporary file in its own folder, read back, and only then takes the place of the
    one before. Its SHA-256 is in ``NAME.sha256`` and is compared when it is loaded; a file that has none, from
    another program, is loaded with a note. Of a checkpoint called ``last...`` the one before is kept as
    ``NAME.previous``. What a killed process left is removed when the next one saves into the folder.

    Loading runs no code of the file: what is not a tensor or a plain value is refused, unless ``weights_only=False``
    is given to the Trainer. Folders that `ModelParallelStrategy` saved are loaded too, in any strategy; for saving
    them there is `VerifiedShards`. Paths with ``://`` are left to Lightning. For Linux and macOS.

    Examples:
        >>> from lightning import Trainer
        >>> trainer = Trainer(plugins=[VerifiedCheckpointIO()], logger=False, accelerator="cpu")
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Save a file; if that fails, the one before is still there.

        Args:
            checkpoint: What to save.
            path: Where to.
            storage_options: Not for local files.
        """
        if is_remote(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_file(path) as file:
            sum_ = _write(checkpoint, file)
            put(Path(file.name), path, [(path.name, sum_)])

    def load_checkpoint(self, path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Return a checkpoint, verified, whole and on the CPU."""
        if is_remote(path):
            return super().load_checkpoint(path, *arguments, **options)
        path, trusted = Path(path), options.get("weights_only") is False
        if not verify(path):
            rank_zero_info(f"{str(path)!r} was saved without a SHA-256, so it is not verified.")
        return read_sharded(path, trusted=trusted) if is_sharded(path) else load_file(path, trusted=trusted)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint with all that belongs to it."""
        if is_remote(path):
            super().remove_checkpoint(path)
            return
        discard(Path(path))
        discard(previous_of(Path(path)))


def is_remote(path: str | Path) -> bool:
    """Return whether a path is an address, whatever local folders are called."""
    return "://" in str(path)


class _Summed:
    """A file for ``torch.save`` that sums up what is written, and keeps the error, which torch does not pass on."""

    def __init__(self, file: FileIO) -> None:
        self.file = file
        self.sha = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.sha.update(data)
        try:
            return write(self.file, data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        pass  # torch asks for it; there is no buffer


def _write(checkpoint: object, file: FileIO) -> str:
    """Write a checkpoint, read it back, and return its SHA-256."""
    summed = _Summed(file)
    try:
        torch.save(checkpoint, summed)  # pyright: ignore[reportArgumentType]
    except RuntimeError as error:
        raise summed.error or error from None
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):  # read the disk, not what the system remembers of it
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if file_sum(Path(file.name)) != summed.sha.hexdigest():
        raise CheckpointError(
            f"{file.name!r} was not written: the disk returns other bytes than it was given."
        )
    return summed.sha.hexdigest()
