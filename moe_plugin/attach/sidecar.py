"""Files with biases: the safetensors file next to a model's own checkpoint, and Lightning checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from moe_plugin.attach.steering.carries_biases import saved_biases
from moe_plugin.checkpoints.safe_load import load_file
from moe_plugin.errors import CheckpointError


def write_sidecar(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write a tensor per bias and per memory of a rule, and the counter; see `BalancedModel.state_dict`."""
    from safetensors.torch import save_file

    tensors = {}
    for name, saved in state["sites"].items():
        tensors[f"{name}|bias"] = saved["bias"].cpu().clone()
        tensors |= {f"{name}|state|{key}": value.cpu().clone() for key, value in saved["state"].items()}
    save_file(tensors, path, metadata={"step": str(state["step"])})


def read_sidecar(path: str | Path) -> dict[str, Any]:
    """Return what `write_sidecar` wrote, or what a Lightning checkpoint holds.

    Raises:
        CheckpointError: If it is a Lightning checkpoint without biases.
    """
    from safetensors import safe_open

    path = Path(path, "meta.pt") if Path(path).is_dir() else Path(path)
    if is_zipfile(path):
        return _of_checkpoint(path)
    sites: dict[str, dict[str, Any]] = {}
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            name, kind, *rest = key.split("|")
            saved = sites.setdefault(name, {"bias": None, "state": {}})
            if kind == "bias":
                saved["bias"] = file.get_tensor(key)
            else:
                saved["state"][rest[0]] = file.get_tensor(key)
    return {"step": step, "sites": sites}


def _of_checkpoint(path: Path) -> dict[str, Any]:
    checkpoint = load_file(path)
    state = saved_biases(checkpoint) if isinstance(checkpoint, Mapping) else None
    if state is None:
        raise CheckpointError(
            f"{str(path)!r} has no biases: it was written by a module that was not balanced."
        )
    return dict(state)
