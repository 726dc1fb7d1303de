"""A file system of a megabyte that fails while a job runs on it: full, read-only, or its folders gone."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from pathlib import Path

from torch import Tensor

from moe_plugin.apps.models import LanguageModel

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000
_READ_ONLY, _REMOUNT, _BIND = 1, 32, 4096


def mount_small_disk(folder: Path, size: str = "1m") -> None:
    """Mount an empty file system that only this process and its children see; it ends with them.

    Raises:
        OSError: This machine doesn't allow it.
    """
    user, group = os.getuid(), os.getgid()
    _check(_LIBC.unshare(_NEW_MOUNTS | _NEW_USER))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount("none", folder, "tmpfs", 0, f"size={size}")


class ModelOnFailingDisk(LanguageModel):
    """Lets the run's disk fail: the variable FAULT says how and when, such as ``full:4096@3``.

    After step 3 the disk has 4,096 free bytes; ``read_only``, ``run_deleted`` and ``checkpoints_deleted`` take no number.
    """

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        fault, _, step = os.environ.get("FAULT", "").partition("@")
        if fault and self.trainer.global_step == int(step) and self.trainer.is_global_zero:
            fail(fault, Path(self.trainer.loggers[0].save_dir))
        return super().training_step(batch, batch_idx)


def fail(fault: str, run_folder: Path) -> None:
    """Make the disk below a run's folder fail."""
    kind, _, number = fault.partition(":")
    if kind == "full":
        _fill(run_folder.parent / "ballast", int(number))
    elif kind == "read_only":
        _mount(run_folder, run_folder, "", _BIND, "")
        _mount("", run_folder, "", _BIND | _REMOUNT | _READ_ONLY, "")
    else:
        shutil.rmtree({"run_deleted": run_folder, "checkpoints_deleted": run_folder / "checkpoints"}[kind])


def _fill(ballast: Path, free: int) -> None:
    """Take all but some bytes of a disk."""
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(ballast, ballast.stat().st_size - free)


def _mount(source: Path | str, target: Path, kind: str, flags: int, options: str) -> None:
    words = [os.fsencode(word) for word in (source, target, kind)]
    _check(_LIBC.mount(*words, ctypes.c_ulong(flags), os.fsencode(options)))


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
