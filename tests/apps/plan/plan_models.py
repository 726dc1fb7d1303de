"""Models for the tests of the plan, and what they really take."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.memory import held_bytes
from moe_plugin.apps.models import LanguageModel
from moe_plugin.apps.plan.cluster import Cluster, Hardware
from moe_plugin.experts import ExpertShape
from moe_plugin.routing import Router, Sigmoid

GLOO = Hardware("gloo", 2, 8.0, 0.0, 0.05, 0.7, 0.1, gather_copies=1)


def plan_model(**changes: Any) -> LanguageModel:
    """Three layers, 16 experts; `changes` replace constructor arguments."""
    sizes = {
        "vocab_size": 512,
        "context_length": 64,
        "dim": 64,
        "num_layers": 3,
        "num_heads": 2,
        "router": partial(Router, score=Sigmoid(), normalize=True),
        "experts": ExpertShape(num_experts=16, top_k=2, hidden_dim=64, num_shared=1),
    }
    return LanguageModel(**(sizes | changes))


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def cluster_of(nodes: int, devices_per_node: int, expert_parallel: int = 1) -> Cluster:
    hardware = Hardware("test", devices_per_node, 80.0, 0.0, 989.0, 450.0, 50.0)
    return Cluster(hardware, nodes, expert_parallel)


class _AwaitCollectives(TorchDispatchMode):
    """Gives gloo's threads time to let go of their tensors: the profiler does not see what they free last."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            time.sleep(0.03)
        return result


def real_bytes(run: Callable[[], object]) -> tuple[int, int]:
    """What the allocator gave out during a run, as torch's profiler saw it: at most, and still at the end."""
    with _AwaitCollectives():
        held = held_bytes(run)
    return max(held), held[-1]
