"""The bias of each router as a checkpoint has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from moe_plugin.apps.inspection.sites import Inspection
from moe_plugin.checkpoints.safe_load import load_file
from moe_plugin.errors import CheckpointError


def read_saved(path: Path, *, trusted: bool = False) -> Mapping[str, Any]:
    """Return what Lightning saved, tensors still on the disk; of a folder without the weights.

    Args:
        path: A checkpoint, a file or a folder with a file per process.
        trusted: The checkpoint is the user's own: it may hold any object, whose code then runs.

    Raises:
        CheckpointError: The checkpoint cannot be read, or is not one of Lightning's.
    """
    if path.is_dir():
        saved = load_file(path / "meta.pt", trusted=trusted)
    else:
        saved = load_file(path, trusted=trusted, mmap=True)
    if not _is_named(saved) or not _is_named(saved.get("state_dict", {} if path.is_dir() else None)):
        raise CheckpointError(f"{str(path)!r} must be a checkpoint of Lightning, with a model's weights.")
    return saved


def saved_biases(checkpoint: Mapping[str, Any], inspection: Inspection) -> dict[str, Tensor]:
    """Return the bias of each router, from the balancing callback's state or the model's own weights.

    Args:
        checkpoint: What Lightning saved.
        inspection: The routers.
    """
    weights = checkpoint.get("state_dict", {})
    biases = {site.name: weights[site.bias_key] for site in inspection.sites if site.bias_key in weights}
    return inspection.fitting(biases | dict(_balanced(checkpoint)))


def _balanced(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the biases that balancing callbacks have saved, whatever else is in their place."""
    states = checkpoint.get("callbacks")
    for state in states.values() if _is_named(states) else ():
        sites = state.get("sites") if _is_named(state) else None
        for name, saved in sites.items() if _is_named(sites) else ():
            if _is_named(saved):
                yield name, saved.get("bias")


def _is_named(value: Any) -> TypeGuard[Mapping[Any, Any]]:
    return isinstance(value, Mapping)
