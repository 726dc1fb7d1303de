"""A disk that fails under a run: one line says what happened and which checkpoint is left."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TypeGuard

from torch.distributed.checkpoint.api import CheckpointException

from moe_plugin.apps.launch.last_checkpoint import newest_checkpoint
from moe_plugin.errors import RunError

OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}


class DiskErrors:
    """Turns an error of the run's disk, whoever meets it within the block, into a `RunError` of one line.

    An error of a thread counts too, at the end of the block at the latest: TensorBoard's events are written by one.
    """

    def __init__(self, folder: Path) -> None:
        """Take the run's folder."""
        self._folder = folder.absolute()
        self._in_threads: list[OSError] = []

    def __enter__(self) -> DiskErrors:
        """Keep what threads meet, which would be printed with its trace."""
        self._report_thread = threading.excepthook
        threading.excepthook = self._note
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Report what the disk did.

        Raises:
            RunError: The disk failed, in the block or in a thread.
        """
        threading.excepthook = self._report_thread
        for cause in (*_causes(error), *self._in_threads):
            if self._is_of_disk(cause):
                raise RunError(self._line(cause)) from error

    def _note(self, args: threading.ExceptHookArgs) -> None:
        if self._is_of_disk(args.exc_value):
            self._in_threads.append(args.exc_value)
        else:
            self._report_thread(args)

    def _is_of_disk(self, error: BaseException | None) -> TypeGuard[OSError]:
        """Return whether a disk fails, or a file of the run is gone or closed to it."""
        if not isinstance(error, OSError):
            return False
        file = _file(error)
        return error.errno in OF_DISKS or (file is not None and file.is_relative_to(self._folder))

    def _line(self, error: OSError) -> str:
        what = f"{error.strerror}: {_file(error) or self._folder}"
        left = newest_checkpoint(self._folder)
        return f"{what}. " + (f"{left} is left to continue from." if left else "No checkpoint is left.")


def _file(error: OSError) -> Path | None:
    """Return the file that an error is about, if it says so."""
    named = isinstance(error.filename, (str, bytes, os.PathLike))
    return Path(os.fsdecode(error.filename)).absolute() if named else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that led to it, on other ranks too."""
    if error is None:
        return
    yield error
    if isinstance(error, CheckpointException):
        for failure, _ in error.failures.values():
            yield from _causes(failure)
    yield from _causes(error.__cause__ or (None if error.__suppress_context__ else error.__context__))
