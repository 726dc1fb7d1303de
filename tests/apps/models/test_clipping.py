from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from moe_plugin.apps.models.clipping import clip_gradients_


def parameters_with_gradients(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.zeros(4, 6)) for _ in range(4)]
    for parameter in parameters[:3]:
        parameter.grad = torch.randn(4, 6, generator=generator)
    return parameters


class TestClipGradients:
    @pytest.mark.parametrize("max_norm", [0.5, 100.0])
    def test_plain_gradients_match_torch(self, max_norm):
        ours, expected = parameters_with_gradients(), parameters_with_gradients()
        norm = clip_gradients_(ours, max_norm)
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(expected, max_norm))
        for a, b in zip(ours[:3], expected[:3], strict=True):
            torch.testing.assert_close(a.grad, b.grad)

    def test_no_gradients_have_norm_zero(self):
        assert clip_gradients_([nn.Parameter(torch.zeros(2))], 1.0) == 0

    def test_gradients_of_three_meshes_match_one_process(self, on_ranks):
        for norm, gradients in on_ranks(4, _clip_on_rank).values():
            expected = parameters_with_gradients()
            torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(expected, 0.5))
            for actual, parameter in zip(gradients, expected[:3], strict=True):
                torch.testing.assert_close(actual, parameter.grad)


def _clip_on_rank(rank, results):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("expert_data_parallel", "expert_parallel"))
    layouts = [(mesh["expert_parallel"], [Shard(0)]), (mesh, [Shard(1), Shard(0)])]
    parameters = parameters_with_gradients()  # the third stays whole on all ranks, the fourth has no gradient
    for index, (ranks, placements) in enumerate(layouts):
        gradient = distribute_tensor(parameters[index].grad, ranks, placements)
        parameters[index] = nn.Parameter(torch.zeros_like(gradient))
        parameters[index].grad = gradient
    norm = clip_gradients_(parameters, 0.5)
    gradients = [parameter.grad for parameter in parameters[:3]]
    results[rank] = norm, [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
