from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from moe_plugin.errors import ConfigError
from moe_plugin.losses import LoadBalancingLoss
from moe_plugin.models.sharding import shard_
from tests.models.small_models import language_model, token_batch


class TestShard:
    @pytest.mark.parametrize("mode", [None, "reentrant", "non_reentrant"])
    def test_two_ranks_have_the_gradients_of_one(self, on_ranks, mode):
        results = on_ranks(2, _gradients_on_rank, mode)
        expected = results[0]["single"]
        for rank in range(2):
            assert results[rank]["sharded"].keys() == expected.keys()
            for name, gradient in results[rank]["sharded"].items():
                torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)

    def test_tensor_parallel_mesh_is_refused(self, on_ranks):
        assert "'tensor_parallel_size' must be 1" in on_ranks(2, _tensor_parallel_on_rank)[0]


def _mesh(data_parallel: int, tensor_parallel: int):
    names = ("data_parallel", "tensor_parallel")
    return init_device_mesh("cpu", (data_parallel, tensor_parallel), mesh_dim_names=names)


def _gradients_on_rank(rank, results, mode):
    torch.manual_seed(0)
    model = language_model(activation_checkpointing=mode, auxiliary_loss=LoadBalancingLoss(0.1))
    batches = [token_batch(2), token_batch(2)]
    for batch in batches:
        (sum(model._losses(batch)) / 2).backward()
    single = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for _ in range(2):  # Lightning calls configure_model once per stage.
        shard_(model.network, _mesh(2, 1))
    assert all(isinstance(layer, FSDPModule) for layer in model.network.layers)
    sum(model._losses(batches[rank])).backward()
    sharded = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    results[rank] = {"single": single, "sharded": sharded}


def _tensor_parallel_on_rank(rank, results):
    try:
        shard_(language_model().network, _mesh(1, 2))
    except ConfigError as error:
        results[rank] = str(error)
