"""Makes the folders that sharding strategies save whole or not there."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed.checkpoint.api import CheckpointException

from moe_plugin.checkpoints.manifest import Sums, file_sum, verify
from moe_plugin.checkpoints.replace import put, set_aside
from moe_plugin.checkpoints.sharded import cause_of, check_plain
from moe_plugin.checkpoints.temporary import sync_path, temporary_folder
from moe_plugin.errors import CheckpointError

_OF_A_RANK = re.compile(r"__(\d+)_.*")


class VerifiedShards(ParallelStrategy):
    """Folders of shards that are whole or not there: what `VerifiedCheckpointIO` does for files.

    To be put before `ModelParallelStrategy` or `FSDPStrategy`. All ranks save into a temporary folder, each sums up
    the files that it wrote, and then the folder takes the place of the one before. When a folder is loaded, the ranks
    share the work of verifying it.

    Examples:
        >>> from lightning.pytorch.strategies import ModelParallelStrategy
        >>> class Strategy(VerifiedShards, ModelParallelStrategy):
        ...     pass
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Save a checkpoint; if that fails, the one before is still there.

        Args:
            checkpoint: What to save.
            filepath: Where to.
            storage_options: Refused by Lightning.
        """
        path = Path(self.broadcast(filepath))
        if not self._saves_folders:
            if self.is_global_zero and path.is_dir():
                set_aside(path)  # Lightning would delete it before the new one is there
            self.barrier()
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(path) if self.is_global_zero else nullcontext() as temporary:
            folder = Path(self.broadcast(temporary))  # pyright: ignore[reportArgumentType]
            sums = self._gathered(lambda: self._saved(checkpoint, path, folder, storage_options))
            if self.is_global_zero:
                put(folder, path, sums)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint that is verified and that runs no code, unless ``weights_only`` is False.

        Raises:
            CheckpointError: It is damaged, is refused, or belongs to another model.
        """
        path = Path(self.broadcast(checkpoint_path))
        self._gathered(lambda: self._verified(path, weights_only))
        given = {} if weights_only is None else {"weights_only": weights_only}
        try:
            return super().load_checkpoint(path, **given)
        except CheckpointException as error:
            reason = " ".join(str(cause_of(error)).split())
            raise CheckpointError(f"{str(path)!r} cannot be loaded into this model: {reason}") from error

    @property
    def _saves_folders(self) -> bool:
        """Whether each rank saves a file: by a switch of FSDP2's strategy, another of FSDP's."""
        kind = getattr(self, "_state_dict_type", "")
        return getattr(self, "_save_distributed_checkpoint", kind == "sharded")

    def _saved(self, checkpoint: dict[str, Any], path: Path, folder: Path, storage_options: Any) -> Sums:
        """Let Lightning save into the folder, and return the sums of this rank's files."""
        try:
            super().save_checkpoint(checkpoint, folder, storage_options)
        except (CheckpointException, RuntimeError) as error:
            raise _not_saved(path, error) from error
        mine = [file for file in sorted(folder.iterdir()) if _rank_of(file) == self.global_rank]
        for file in mine:
            sync_path(file)
        return [(file.name, file_sum(file)) for file in mine]

    def _verified(self, path: Path, weights_only: bool | None) -> Sums:
        """Verify this rank's share of the files."""
        if not verify(path, self.global_rank, self.world_size):
            rank_zero_info(f"{str(path)!r} was saved without a SHA-256, so it is not verified.")
        if weights_only is not False:
            check_plain(path)
        return []

    def _gathered(self, work: Callable[[], Sums]) -> Sums:
        """Return what all ranks return; where one fails, all do, rather than wait for it."""
        outcomes: list[Sums | Exception] = [[]] * self.world_size
        dist.all_gather_object(outcomes, _outcome(work))
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        return [pair for outcome in outcomes if not isinstance(outcome, Exception) for pair in outcome]


def _outcome(work: Callable[[], Sums]) -> Sums | Exception:
    try:
        return work()
    except (CheckpointError, OSError) as error:
        return error


def _not_saved(path: Path, error: BaseException) -> OSError | CheckpointError:
    """Return an error of one line for one of torch's."""
    cause = cause_of(error) if isinstance(error, CheckpointException) else error
    # Where a disk is full, torch may complain of positions in a file instead.
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if _is_full(path.parent) else None
    if isinstance(known := full or cause, OSError):
        return OSError(known.errno, known.strerror, str(path))
    return CheckpointError(f"{str(path)!r} was not saved: {' '.join(str(cause).split())}")


def _is_full(folder: Path) -> bool:
    return shutil.disk_usage(folder).free < 2**20


def _rank_of(file: Path) -> int:
    """Return which rank wrote a file of a folder."""
    written = _OF_A_RANK.fullmatch(file.name)
    return int(written[1]) if written else 0
