"""The safetensors file that holds biases next to a model's own checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_sidecar(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write a tensor per bias and per memory of a rule, and the counter; see `BalancedModel.state_dict`."""
    from safetensors.torch import save_file

    tensors = {}
    for name, saved in state["sites"].items():
        tensors[f"{name}|bias"] = saved["bias"].cpu().clone()
        tensors |= {f"{name}|state|{key}": value.cpu().clone() for key, value in saved["state"].items()}
    save_file(tensors, path, metadata={"step": str(state["step"])})


def read_sidecar(path: str | Path) -> dict[str, Any]:
    """Read what `write_sidecar` wrote."""
    from safetensors import safe_open

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
