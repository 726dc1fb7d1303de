"""A small file system that fails while a job runs on it: full, read-only, or its folders gone."""

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


def mount_small_disk(folder: Path) -> None:
    """Mount an empty file system of 2 MiB that only this process and its children see; it ends with them.

    Raises:
        OSError: This machine doesn't allow it.
    """
    user, group = os.getuid(), os.getgid()
    _check(_LIBC.unshare(_NEW_MOUNTS | _NEW_USER))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount("none", folder, "tmpfs", 0, "size=2m")


class ModelOnFailingDisk(LanguageModel):
    """Lets the run's disk fail: FAULT has how and after which step, as ``full:4096@3`` or ``full:0@end``."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self._fail(str(self.trainer.global_step))
        return super().training_step(batch, batch_idx)

    def on_fit_end(self) -> None:
        self._fail("end")

    def _fail(self, now: str) -> None:
        fault, _, when = os.environ.get("FAULT", "").partition("@")
        if when == now and self.trainer.is_global_zero:
            fail(fault, Path(self.trainer.loggers[0].save_dir))


def fail(fault: str, run_folder: Path) -> None:
    """Let the disk fail below a run's folder: ``full:4096`` has 4,096 bytes left."""
    kind, _, number = fault.partition(":")
    if kind == "full":
        _fill(run_folder.parent / "ballast", int(number))
    elif kind == "read_only":
        _mount(run_folder, run_folder, "", _BIND, "")
        _mount("", run_folder, "", _BIND | _REMOUNT | _READ_ONLY, "")
    else:
        shutil.rmtree({"run_deleted": run_folder, "checkpoints_deleted": run_folder / "checkpoints"}[kind])


def mend(fault: str, run_folder: Path) -> None:
    """Undo a fault as far as it can be undone."""
    if fault.startswith("full"):
        (run_folder.parent / "ballast").unlink()
    elif fault == "read_only":
        _check(_LIBC.umount2(os.fsencode(run_folder), 2))


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
