"""Reads both kinds of checkpoint, a file and a folder with a file per process, in strategies that know only files."""

from __future__ import annotations

import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from moe_plugin.errors import CheckpointError

LIGHTNINGS_PART = "meta.pt"
MODEL, OPTIMIZER = "state_dict", "optimizer_"


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's reading and writing of files; a folder is put together as it is read."""

    def load_checkpoint(self, path: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Return the checkpoint, whole and on the CPU."""
        if _is_sharded(path):
            return _read_sharded(Path(path))
        return super().load_checkpoint(path, *arguments, **options)


def _is_sharded(path: str | Path) -> bool:
    """Return whether a checkpoint is a folder with a file per process."""
    return (Path(path) / LIGHTNINGS_PART).is_file()


def shapes_in(path: str | Path) -> dict[str, torch.Size]:
    """Return the shape of each tensor of a checkpoint's model by its name, without reading the tensors.

    Raises:
        CheckpointError: The file or folder is no checkpoint.
    """
    if _is_sharded(path):
        stored = FileSystemReader(path).read_metadata().state_dict_metadata
        tensors = {
            name: each.size for name, each in stored.items() if isinstance(each, TensorStorageMetadata)
        }
        prefix = f"{MODEL}."
        return {n.removeprefix(prefix): size for n, size in tensors.items() if n.startswith(prefix)}
    try:
        model = torch.load(path, mmap=True, map_location="cpu", weights_only=False)[MODEL]
    except (UnpicklingError, EOFError, KeyError, RuntimeError, OSError) as error:
        raise CheckpointError(f"'ckpt_path' must be a checkpoint of Lightning, got {str(path)!r}.") from error
    return {name: value.shape for name, value in model.items() if isinstance(value, Tensor)}


def _read_sharded(folder: Path) -> dict[str, Any]:
    """Return what `ModelParallelStrategy` saved in a folder in the form that it has in a file."""
    metadata = FileSystemReader(folder).read_metadata()
    values = {
        name: torch.empty(each.size, dtype=each.properties.dtype)
        if isinstance(each, TensorStorageMetadata)
        else None
        for name, each in metadata.state_dict_metadata.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        load(values, checkpoint_id=folder, no_dist=True)
    tree = _nested(values, metadata.planner_data)
    optimizers = sorted(key for key in tree if key.startswith(OPTIMIZER))
    checkpoint = torch.load(folder / LIGHTNINGS_PART, map_location="cpu", weights_only=False)
    return checkpoint | {
        MODEL: tree[MODEL],
        "optimizer_states": [_numbered(tree[optimizer]) for optimizer in optimizers],
    }


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
