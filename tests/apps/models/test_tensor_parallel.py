from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from moe_plugin import LossFreeBalancing, Sign
from moe_plugin.apps.models.tensor_parallel import tensor_parallel_
from moe_plugin.attach.balanced_model import find_balanced
from moe_plugin.errors import ConfigError
from moe_plugin.experts import ExpertShape
from moe_plugin.sharding import shard_
from tests.apps.models.small_models import language_model, token_batch
from tests.hosts import Host
from tests.sharding.ranks import trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*"),
]
SHAPES = {"num_dense": 1, "experts": ExpertShape(4, 2, 8, num_shared=1)}


class TestGradients:
    @pytest.mark.parametrize("replicas", [1, 2])
    def test_split_network_has_the_gradients_of_the_whole(self, replicas, on_ranks):
        results = on_ranks(2 * replicas, gradients_on_rank, replicas)
        for rank in range(2 * replicas):
            assert results[rank]["local_qkv"] == 3 * 16 // 2 // replicas
            for name, (actual, expected) in results[rank]["gradients"].items():
                torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5, msg=name)

    def test_single_rank_changes_nothing(self, on_ranks):
        assert on_ranks(1, untouched_on_rank)[0]


def mesh_of(replicas, split):
    names = ("data_parallel", "tensor_parallel")
    return init_device_mesh("cpu", (replicas, split), mesh_dim_names=names)


def gradients_on_rank(rank, results, replicas):
    torch.manual_seed(0)
    model, mesh = language_model(**SHAPES), mesh_of(replicas, 2)
    batches = [token_batch(2) for _ in range(replicas)]
    for batch in batches:
        (model._losses(batch)[0] / replicas).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for _ in range(2):
        tensor_parallel_(model.network, mesh["tensor_parallel"])
        shard_(model.network, mesh)
    model._losses(batches[rank // 2])[0].backward()
    gradients = {n: (p.grad.full_tensor(), expected[n]) for n, p in model.named_parameters()}
    qkv = model.network.layers[0].attention.qkv.weight
    results[rank] = {"gradients": gradients, "local_qkv": len(qkv.to_local())}


def untouched_on_rank(rank, results):
    model = language_model()
    tensor_parallel_(model.network, mesh_of(1, 1)["tensor_parallel"])
    results[rank] = not any(isinstance(parameter, DTensor) for parameter in model.parameters())


class TestBalancing:
    def test_tokens_count_once_however_many_ranks_compute_them(self, on_ranks):
        alone = {}
        fit(0, alone, "single")
        split = on_ranks(2, fit, "fsdp")
        assert split[0] == split[1] == alone[0]
        assert sum(alone[0]["counts"][0]) == 4 * 12 * 2


def fit(rank, results, kind):
    torch.manual_seed(0)
    model, batches = language_model(**SHAPES), [token_batch(4) for _ in range(5)]
    sizes = {"data_parallel_size": 1, "tensor_parallel_size": 2}
    callback = LossFreeBalancing(Sign(rate=0.01))
    run = trainer(kind, distributed=sizes if kind == "fsdp" else {}, max_epochs=1, callbacks=[callback])
    run.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))
    balanced = find_balanced(model)
    counts = [count.tolist() for count in balanced.record.counts.values()]
    results[rank] = {"biases": [site.bias.tolist() for site in balanced.values()], "counts": counts}


class TestRefusals:
    def test_what_does_not_divide_is_named(self, on_ranks):
        messages = on_ranks(2, refusals_on_rank)[0]
        assert "'tensor_parallel_size' must divide the 3 heads, got 2" in messages[0]
        assert "'tensor_parallel_size' must divide the 5 hidden units" in messages[1]
        assert "'tensor_parallel_size' must be 1 for a network that is not ours" in messages[2]


def refusals_on_rank(rank, results):
    mesh, messages = mesh_of(1, 2)["tensor_parallel"], []
    odd_heads = language_model(dim=18, num_heads=3)
    odd_hidden = language_model(num_dense=1, dense_hidden_dim=5)
    for network in (odd_heads.network, odd_hidden.network, Host()):
        with pytest.raises(ConfigError) as caught:
            tensor_parallel_(network, mesh)
        messages.append(str(caught.value))
    results[rank] = messages
    dist.barrier()  # a rank that leaves early takes the store with it
