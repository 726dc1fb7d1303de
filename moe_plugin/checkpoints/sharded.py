"""Reads checkpoints that are folders with a file per process, as `ModelParallelStrategy` saves them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from moe_plugin.checkpoints.safe_load import DAMAGES, load_file, read_metadata, told
from moe_plugin.errors import CheckpointError

LIGHTNINGS_PART = "meta.pt"
MODEL, OPTIMIZER = "state_dict", "optimizer_"


def is_sharded(path: str | Path) -> bool:
    """Return whether a checkpoint is a folder with a file per process."""
    return Path(path).is_dir()


def shapes_in(path: str | Path, *, trusted: bool = False) -> dict[str, torch.Size]:
    """Return the shape of each tensor of a checkpoint's model by its name, without reading the tensors.

    Args:
        path: The checkpoint, a file or a folder.
        trusted: It is the user's own, see `load_file`.

    Raises:
        CheckpointError: The file or folder is no checkpoint, or must not be read as one.
    """
    if is_sharded(path):
        if not trusted:
            check_plain(path)
        stored = read_metadata(path, trusted=trusted).state_dict_metadata
        tensors = {
            name: each.size for name, each in stored.items() if isinstance(each, TensorStorageMetadata)
        }
        prefix = f"{MODEL}."
        return {n.removeprefix(prefix): size for n, size in tensors.items() if n.startswith(prefix)}
    checkpoint = load_file(path, trusted=trusted, mmap=True)
    model = checkpoint.get(MODEL) if isinstance(checkpoint, dict) else None
    if not isinstance(model, dict):
        raise CheckpointError(f"'ckpt_path' must be a checkpoint of Lightning, got {str(path)!r}.")
    return {name: value.shape for name, value in model.items() if isinstance(value, Tensor)}


def check_plain(path: str | Path) -> None:
    """Check that reading a checkpoint runs no code of it, for readers that would run it.

    Args:
        path: The checkpoint, a file or a folder.

    Raises:
        CheckpointError: It is damaged, or holds a type that is refused; it names the type.
    """
    if not is_sharded(path):
        load_file(path, mmap=True)
        return
    folder = Path(path)
    load_file(folder / LIGHTNINGS_PART, mmap=True)
    metadata = read_metadata(folder)
    stored = metadata.state_dict_metadata
    values = {name: None for name, each in stored.items() if not isinstance(each, TensorStorageMetadata)}
    with _read_as_data(folder):
        _read_(values, folder, _PlainReader(folder, metadata), _PlainPlanner(folder))


def read_sharded(folder: Path, *, trusted: bool = False) -> dict[str, Any]:
    """Return what `ModelParallelStrategy` saved in a folder in the form that it has in a file.

    Args:
        folder: The checkpoint.
        trusted: It is the user's own, see `load_file`.

    Raises:
        CheckpointError: It is damaged, or holds a type that is refused; it names the type.
    """
    metadata, rest = (
        read_metadata(folder, trusted=trusted),
        load_file(folder / LIGHTNINGS_PART, trusted=trusted),
    )
    with _read_as_data(folder):
        values = {
            name: torch.empty(each.size, dtype=each.properties.dtype)
            if isinstance(each, TensorStorageMetadata)
            else None
            for name, each in metadata.state_dict_metadata.items()
        }
        if trusted:
            _read_(values, folder, FileSystemReader(folder), DefaultLoadPlanner())
        else:
            _read_(values, folder, _PlainReader(folder, metadata), _PlainPlanner(folder))
        tree = _nested(values, metadata.planner_data)
        optimizers = sorted(key for key in tree if key.startswith(OPTIMIZER))
        states = [_numbered(tree[optimizer]) for optimizer in optimizers]
        return rest | {MODEL: tree[MODEL], "optimizer_states": states}


class _PlainReader(FileSystemReader):
    """A reader of shards that takes metadata that were read as data."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


class _PlainPlanner(DefaultLoadPlanner):
    """Torch's planner, which would run the code of what is stored next to the tensors."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            torch.load(value, map_location="cpu", weights_only=True)
        except DAMAGES as error:
            raise told(self.folder / read_item.storage_index.fqn, error) from error
        value.seek(0)
        super().load_bytes(read_item, value)


def _read_(
    values: dict[str, Any], folder: Path, reader: FileSystemReader, planner: DefaultLoadPlanner
) -> None:
    """Fill in what a folder holds under the names of the values."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        load(values, checkpoint_id=folder, storage_reader=reader, planner=planner, no_dist=True)


def cause_of(error: CheckpointException) -> BaseException:
    """Return what went wrong on the first rank where something did; torch wraps it in a traceback of each rank."""
    causes = [cause for cause, _ in error.failures.values()]
    return next((cause for cause in causes if isinstance(cause, CheckpointError | OSError)), causes[0])


@contextmanager
def _read_as_data(folder: Path) -> Iterator[None]:
    """Turn what a damaged folder makes torch raise into one line."""
    try:
        yield
    except CheckpointException as error:
        cause = cause_of(error)
        raise cause if isinstance(cause, CheckpointError) else told(folder, cause) from error
    except CheckpointError:
        raise
    except DAMAGES as error:
        raise told(folder, error) from error


def _nested(values: dict[str, Any], paths: dict[str, tuple]) -> dict[Any, Any]:
    """Return the values as the tree they were saved from; lists come as mappings from their indices."""
    tree: dict[Any, Any] = {}
    for name, value in values.items():
        *parents, last = paths[name]
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def _numbered(optimizer: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state with its parameters by number, in the order of its groups, instead of by name."""
    groups = [optimizer["param_groups"][i] for i in sorted(optimizer["param_groups"])]
    numbers = {name: i for i, name in enumerate(name for group in groups for name in group["params"])}
    state = {numbers[name]: values for name, values in optimizer.get("state", {}).items()}
    return {
        "state": state,
        "param_groups": [g | {"params": [numbers[n] for n in g["params"]]} for g in groups],
    }
