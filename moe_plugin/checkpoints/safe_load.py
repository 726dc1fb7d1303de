"""Reads checkpoints as data: nothing that a file names is imported or called, unless the user trusts the file."""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata

from moe_plugin.errors import CheckpointError

DAMAGES = (
    *(pickle.UnpicklingError, EOFError, RuntimeError, OSError, LookupError, TypeError, AttributeError),
    *(ValueError, AssertionError, ArithmeticError, MemoryError, ImportError, struct.error),
)
"""What torch and pickle raise for files that are damaged or something else."""

METADATA = ".metadata"
"""The file in a sharded checkpoint that says which shard holds what."""

_PARTS = ("state_dict_metadata", "planner_data", "storage_data")
_REFUSED = re.compile(r"GLOBAL (\S+)|function (<.*?>)|got (<.*?>)")
_LAYOUTS = {str(layout): layout for layout in vars(torch).values() if isinstance(layout, torch.layout)}
_CLASSES = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _LAYOUTS.__getitem__,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    **{("pathlib", name): PurePosixPath for name in ("PosixPath", "PurePosixPath")},
    **{
        (metadata.__name__, name): getattr(metadata, name)
        for name in (*metadata.__all__, "_MEM_FORMAT_ENCODING")
    },
}

# Python's own: the one in C has no `load_build` to override.
_PythonUnpickler: Any = pickle._Unpickler


def load_file(path: str | Path, *, trusted: bool = False, mmap: bool = False) -> Any:
    """Return what ``torch.save`` wrote into a file, on the CPU: tensors and plain values only.

    Args:
        path: A local file.
        trusted: The file is the user's own: it may hold any object, whose code then runs.
        mmap: Leave the tensors on the disk until they are read.

    Raises:
        CheckpointError: The file is missing or damaged, or holds a type that is refused; it names the type.
    """
    if not Path(path).is_file():
        raise _no_file(path)
    try:
        mapped = mmap and zipfile.is_zipfile(path)  # torch's older format cannot be
        return torch.load(path, map_location="cpu", weights_only=not trusted, mmap=mapped)
    except DAMAGES as error:
        raise told(path, error) from error


def read_metadata(folder: str | Path, *, trusted: bool = False) -> Metadata:
    """Return what a sharded checkpoint's ``.metadata`` says of its shards.

    Args:
        folder: The checkpoint.
        trusted: The checkpoint is the user's own: the file may name any class, whose code then runs.

    Raises:
        CheckpointError: The file is missing or damaged, or names a type or another file that is refused.
    """
    path = Path(folder) / METADATA
    if not path.is_file():
        raise _no_file(path)
    try:
        with path.open("rb") as file:
            read = (pickle.Unpickler if trusted else _MetadataUnpickler)(file).load()
    except DAMAGES as error:
        raise told(path, error) from error
    if not isinstance(read, Metadata) or not all(
        isinstance(read.__dict__.get(name), dict) for name in _PARTS
    ):
        raise CheckpointError(f"{str(path)!r} must hold the metadata of a sharded checkpoint, and does not.")
    if not trusted:
        _check_files(path, read)
    return read


def _check_files(path: Path, metadata: Metadata) -> None:
    """Check that torch will read no other files than those of the folder that we know."""
    for stored in metadata.storage_data.values():
        name = getattr(stored, "relative_path", "")
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{str(path)!r} must name only files of its folder, got {name!r}.")
    # Torch turns to one of a rank if something about the first makes it fail.
    for file in path.parent.glob(f"__*{METADATA}"):
        raise CheckpointError(f"{str(file)!r} must not be there: {METADATA!r} is for all ranks.")


class _MetadataUnpickler(_PythonUnpickler):
    """An unpickler that makes what a checkpoint's metadata consists of, and nothing else."""

    dispatch: ClassVar[dict[int, Any]] = dict(_PythonUnpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the allowed classes, or a dtype."""
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if (module, name) not in _CLASSES:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return _CLASSES[module, name]

    def load_build(self) -> None:
        """Fill an object; classes and their constants, which all users of torch share, stay as they are."""
        if isinstance(shared := self.stack[-2], type | Enum):
            raise pickle.UnpicklingError(f"GLOBAL {shared}.__setattr__")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def _no_file(path: str | Path) -> CheckpointError:
    return CheckpointError(f"{str(path)!r} must be a file, and there is none.")


def told(path: str | Path, error: BaseException) -> CheckpointError:
    """Return an error for the user: the type that was refused, or that the file is damaged.

    Args:
        path: The file.
        error: What torch or pickle raised, one of `DAMAGES`.
    """
    refused = _REFUSED.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if refused is None:
        kind = type(error).__name__
        return CheckpointError(f"{str(path)!r} is damaged or no checkpoint: it cannot be read ({kind}).")
    name = next(each for each in refused.groups() if each)
    return CheckpointError(
        f"{str(path)!r} must hold tensors and plain values only, got {name!r}, whose code could do anything."
        " If you made the file yourself, allow it with trust=true (--trust; in a Trainer of yours weights_only=False)."
    )
