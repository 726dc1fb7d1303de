"""The planned memory of a rank against that of two real gloo ranks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as TorchDDP

from moe_plugin.apps.plan.cluster import Cluster
from moe_plugin.apps.plan.layouts import DistributedDataParallel, ExpertParallel, FullySharded
from moe_plugin.apps.plan.steps import spread_steps, whole_steps
from moe_plugin.apps.plan.trace import next_token_loss
from moe_plugin.experts import ExpertShape
from moe_plugin.experts.parallel import expert_mesh, parallelize_experts_
from moe_plugin.sharding import find_layers, shard_
from tests.apps.plan.plan_models import GLOO, on_meta, plan_model, real_bytes

MODELS = {
    "16 experts": plan_model,
    "large experts": partial(plan_model, experts=ExpertShape(16, 2, 256)),
    "large vocabulary": partial(plan_model, vocab_size=8192, num_layers=2),
    "checkpointed": partial(plan_model, activation_checkpointing="non_reentrant", num_layers=6),
}
CASES = [
    *(("16 experts", 2), ("16 experts", 12), ("large experts", 6)),
    *(("large vocabulary", 4), ("checkpointed", 8)),
]
LENGTH = 64


def planned(kind, build, sequences):
    cluster = Cluster(GLOO, 1, expert_parallel=2)
    if kind == "ep":
        steps = spread_steps(lambda: on_meta(build), LENGTH, None, 2)
        first = len(steps.units) - steps.num_experts_apart
        layout = ExpertParallel(steps.units[:first], steps.units[first:], cluster)
    else:
        steps = whole_steps(lambda: on_meta(build), LENGTH, None)
        layout = {"ddp": DistributedDataParallel, "fsdp": FullySharded}[kind](steps.units, cluster)
    return layout.memory(steps.step(sequences))


def wrapped(kind, model):
    """The model on this layout, and what training calls."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",))
    if kind == "ddp":
        return TorchDDP(model)
    if kind == "fsdp":
        shard_(model.network, mesh)
    if kind == "ep":
        apart = parallelize_experts_(model, expert_mesh(mesh, 2))
        for unit in [*find_layers(model.network), model.network]:
            fully_shard(unit, mesh=mesh, ignored_params=apart)
    return model


def local_bytes(tensors):
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.untyped_storage().nbytes() for tensor in local)


def measure_on_rank(rank, results, kind):
    for name, sequences in CASES:
        torch.manual_seed(0)
        model, tokens_BS = MODELS[name](), torch.randint(0, 512, (sequences, LENGTH))
        made = []
        dist.barrier()  # A rank that lags lets the other's tensors go later than `real_bytes` waits for.
        _, kept = real_bytes(lambda model=model, made=made: made.append(wrapped(kind, model)))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def step(made=made, tokens_BS=tokens_BS):
            next_token_loss(made[0], tokens_BS).backward()

        for _ in range(2):  # DDP makes its buckets anew in the second step.
            step()
            optimizer.step()
            optimizer.zero_grad()
        dist.barrier()
        peak, _ = real_bytes(step)
        states = [v for state in optimizer.state.values() for v in state.values() if v.numel() > 1]
        results[rank, name, sequences] = {
            "parameters": local_bytes(model.parameters()),
            "gradients": local_bytes(p.grad for p in model.parameters()),
            "optimizer": local_bytes(states),
            "peak": peak + (kept if kind == "ddp" else 0),
        }


@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("ddp", "fsdp")), "ep"]
)
class TestLayouts:
    def test_memory_is_within_a_tenth_of_that_of_real_ranks(self, on_ranks, kind):
        results = on_ranks(2, measure_on_rank, kind)
        for name, sequences in CASES:
            plan, real = planned(kind, MODELS[name], sequences), results[0, name, sequences]
            total = real["parameters"] + real["optimizer"] + real["peak"]
            ratio = f"{plan.total / total:.3f}"
            print(f"{kind}, {name}, {sequences}: planned {plan.total:,}, measured {total:,}: {ratio}")
            assert plan.parameters == pytest.approx(real["parameters"], rel=0.01)
            assert plan.optimizer == pytest.approx(real["optimizer"], rel=0.01)
            assert plan.total == pytest.approx(total, rel=0.1)
