"""The planned collectives against those of a real step at world 64 and 512, in one process by torch's fake backend."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from moe_plugin.apps.plan.cluster import Group
from moe_plugin.apps.plan.exchange import row_exchange
from moe_plugin.apps.plan.fake_expert_shards import spread_experts_
from moe_plugin.apps.plan.fsdp_units import modules_of_units, units_of
from moe_plugin.apps.plan.layouts import DistributedDataParallel, ExpertParallel, FullySharded
from moe_plugin.apps.plan.meta_model import bias_count_bytes
from moe_plugin.apps.plan.trace import next_token_loss
from moe_plugin.apps.plan.traffic import Transfer
from moe_plugin.apps.plan.workload import Workload
from moe_plugin.attach.balance import balance_
from moe_plugin.attach.discovery.routed_experts import find_routed_experts
from moe_plugin.experts import ExpertShape
from moe_plugin.experts.parallel import expert_mesh, parallelize_experts_
from moe_plugin.sharding import find_layers, shard_
from tests.apps.plan.plan_models import cluster_of, on_meta, plan_model

# Which argument of torch's collectives the plan counts, and under what name.
OPERATIONS = {
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "allreduce_": ("all_reduce", 0),
}
SHAPE = (2, 64)


class Recorder(TorchDispatchMode):
    """Counts calls and bytes of each kind of collective."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            operation, argument = OPERATIONS[func.__name__.partition(".")[0]]
            tensors = args[argument] if isinstance(args[argument], list) else [args[argument]]
            self.calls[operation] += 1
            self.bytes[operation] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def mesh(request):
    dist.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield init_device_mesh("cpu", (request.param,), mesh_dim_names=("data_parallel",))
    dist.destroy_process_group()


def build(checkpointing=None):
    shape = ExpertShape(256, 8, 16)
    return plan_model(num_layers=1, experts=shape, activation_checkpointing=checkpointing)


def recorded(model):
    """A real forward, backward and update; checks that every parameter got a gradient."""
    balanced = balance_(model)
    with Recorder() as recorder:
        next_token_loss(model, torch.randint(0, 512, SHAPE)).backward()
        record = balanced.update()
    assert all(parameter.grad is not None for parameter in model.parameters())
    (counts_E,) = record.counts.values()
    assert counts_E.shape == (256,)
    return recorder


def planned(transfers):
    calls, sizes = Counter(), Counter()
    for transfer in transfers:
        calls[transfer.operation] += transfer.calls
        sizes[transfer.operation] += transfer.size
    return calls, sizes


def bias_counts(model, cluster):
    return Transfer(
        "bias counts", "all_reduce", cluster.everyone, 1, bias_count_bytes(find_routed_experts(model))
    )


@pytest.mark.parametrize("mesh", [64, 512], indirect=True)
class TestFullySharded:
    def test_collectives_are_those_of_a_real_step(self, mesh):
        model, cluster = on_meta(build), cluster_of(mesh.size() // 8, 8)
        layout = FullySharded(units_of(modules_of_units(model)), cluster)
        calls, sizes = planned([*layout.traffic(), bias_counts(model, cluster)])
        real = build()
        shard_(real.network, mesh)
        recorder = recorded(real)
        assert (recorder.calls, recorder.bytes) == (calls, sizes)


@pytest.mark.parametrize("checkpointing", [None, "non_reentrant"])
@pytest.mark.parametrize(("mesh", "expert_parallel"), [(64, 64), (64, 16)], indirect=["mesh"])
class TestExpertParallel:
    def test_collectives_are_those_of_a_real_step(self, mesh, expert_parallel, checkpointing):
        model, cluster = on_meta(build), cluster_of(mesh.size() // 8, 8, expert_parallel)
        work = Workload(lambda: model, *SHAPE, "32-true", checkpointing is not None)
        others = [*row_exchange(model, work, cluster).transfers, bias_counts(model, cluster)]
        experts = spread_experts_(model, expert_parallel)
        units = units_of(modules_of_units(model, experts), experts)
        layout = ExpertParallel(units[:-1], units[-1:], cluster)
        calls, sizes = planned([*layout.traffic(), *others])
        real = build(checkpointing)
        apart = parallelize_experts_(real, expert_mesh(mesh, expert_parallel))
        for unit in [*find_layers(real.network), real.network]:
            fully_shard(unit, mesh=mesh, ignored_params=apart)
        recorder = recorded(real)
        assert (recorder.calls, recorder.bytes) == (calls, sizes)


class TestDistributedDataParallel:
    def test_each_gradient_is_reduced_once(self):
        model, cluster = on_meta(build), cluster_of(8, 8)
        (transfer,) = DistributedDataParallel(units_of(modules_of_units(model)), cluster).traffic()
        assert transfer.size == sum(p.numel() * p.element_size() for p in model.parameters())


class TestTransfer:
    def test_ring_sends_all_but_its_own_part(self):
        transfer = Transfer("x", "all_gather", Group(1, 8), 1, 800)
        assert (transfer.intra_node, transfer.inter_node) == (700, 0)

    def test_all_reduce_goes_round_twice(self):
        assert Transfer("x", "all_reduce", Group(1, 8), 1, 800).intra_node == 1400

    def test_rings_over_nodes_share_the_cards(self):
        transfer = Transfer("x", "all_gather", Group(2, 4), 1, 800)
        assert (transfer.intra_node, transfer.inter_node) == (700 * 3 / 4, 700 / 4)

    def test_ring_with_one_rank_per_node_stays_in_none(self):
        transfer = Transfer("x", "reduce_scatter", Group(8, 1), 1, 800)
        assert (transfer.intra_node, transfer.inter_node) == (0, 700)

    def test_all_to_all_keeps_its_nodes_part(self):
        transfer = Transfer("x", "all_to_all", Group(2, 4), 1, 800)
        assert (transfer.intra_node, transfer.inter_node) == (300, 400)

    def test_alone_nothing_is_sent(self):
        assert Transfer("x", "all_reduce", Group(1, 1), 1, 800).sent == 0
