"""Checkpoints that run code when they are unpickled, and real ones to hide it in."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy

from moe_plugin.checkpoints import VerifiedShards


class Sharding(VerifiedShards, ModelParallelStrategy):
    pass


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.makedirs, (self.path, 0o777, True)


def state(step: int, size: int = 1000) -> dict:
    """A checkpoint as Lightning hands it to its plugins."""
    generator = torch.Generator().manual_seed(step)
    weights = {"a": torch.randn(size, generator=generator), "b": torch.randn(7, generator=generator)}
    optimizer = {
        "state": {name: {"exp_avg": torch.full_like(weight, step)} for name, weight in weights.items()},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": list(weights)}],
    }
    return {"state_dict": weights, "optimizer_states": [optimizer], "global_step": step}


def save_folder(path: Path, checkpoint: dict) -> None:
    """What `ModelParallelStrategy` leaves, without sums and without a process group."""
    rest = dict(checkpoint)
    parts = {"state_dict": rest.pop("state_dict")}
    parts |= {f"optimizer_{i}": each for i, each in enumerate(rest.pop("optimizer_states"))}
    dcp.save(parts, checkpoint_id=path, no_dist=True)
    torch.save(rest, path / "meta.pt")


def one_rank() -> Sharding:
    """The strategy without a trainer, in a process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    strategy = Sharding(1, 1, save_distributed_checkpoint=True)
    strategy.cluster_environment = LightningEnvironment()
    return strategy


def hide_(kind: str, path: Path, canary: Path) -> Path:
    """Saves a checkpoint that runs code where `kind` says, and returns it."""
    if kind == "file":
        torch.save(state(1) | {"extra": Canary(canary)}, path)
        return path
    if kind == "old file":
        torch.save(state(1) | {"extra": Canary(canary)}, path, _use_new_zipfile_serialization=False)
        return path
    hidden = state(1)
    if kind == "byte entry":
        hidden["optimizer_states"][0]["param_groups"][0]["lr"] = Canary(canary)
    save_folder(path, hidden)
    if kind == "meta.pt":
        torch.save({"global_step": 1, "extra": Canary(canary)}, path / "meta.pt")
    elif kind == ".metadata":
        metadata = pickle.loads((path / ".metadata").read_bytes())
        metadata.version = Canary(canary)
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return path


KINDS = ("file", "old file", "meta.pt", ".metadata", "byte entry")
