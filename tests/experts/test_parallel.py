from __future__ import annotations

import copy

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from moe_plugin.errors import ConfigError
from moe_plugin.experts import GroupedExperts, MoEBlock, expert_mesh, parallelize_experts_
from moe_plugin.routing import Router, Sigmoid
from tests.experts.expert_layers import EXPERTS, LAYERS, apply, expert_layer, routed_tokens

ALL = list(range(EXPERTS))
# Tokens of each rank, and the experts that each chooses from: two per token, or the only one.
LOADS = {
    "even": ([6, 6], [ALL, ALL]),
    "skewed": ([9, 2], [[0, 1, 2], [0, 1, 6]]),
    "all_on_one_rank": ([5, 5], [[4, 5], [5, 6, 7]]),
    "rank_without_tokens": ([7, 0], [ALL, ALL]),
    "tokens_and_experts_apart": ([0, 4], [ALL, [0, 1]]),
    "all_on_one_expert": ([4, 3], [[5], [5]]),
}


def assert_all_small(results: dict[int, dict[str, float]]) -> None:
    differences = {(rank, load): value for rank, loads in results.items() for load, value in loads.items()}
    assert differences
    # Sums of fp32 in another order: 1.9e-6 of the largest value was seen.
    assert {case: value for case, value in differences.items() if not value < 5e-6} == {}


class TestParallelizeExperts:
    @pytest.mark.parametrize("kind", LAYERS)
    def test_two_ranks_give_outputs_and_gradients_of_one(self, on_ranks, kind):
        assert_all_small(on_ranks(2, _compare_on_rank, expert_layer(kind), LOADS))

    @pytest.mark.parametrize("kind", ["ours", "gpt_oss"])
    def test_two_by_two_ranks_give_outputs_and_gradients_of_one(self, on_ranks, kind):
        load = ([6, 0, 3, 5], [ALL, ALL, [0, 1], [5, 6, 7]])
        assert_all_small(on_ranks(4, _compare_on_rank, expert_layer(kind), {"2 x 2": load}, 2))

    @pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
    def test_other_implementations_of_the_host_give_the_same(self, on_ranks, implementation):
        layer = expert_layer("mixtral", implementation)
        loads = {name: LOADS[name] for name in ("skewed", "all_on_one_rank")}
        assert_all_small(on_ranks(2, _compare_on_rank, layer, loads))

    def test_parameters_hold_the_rank_s_experts_only(self, on_ranks):
        for rank, (own, is_part, names) in on_ranks(2, _storage_on_rank).items():
            assert own == EXPERTS // 2, rank
            assert is_part
            assert names == ["gate_up", "down"]

    def test_twice_does_no_harm(self, on_ranks):
        results = on_ranks(2, _twice_on_rank)
        assert results == {0: True, 1: True}

    def test_number_of_experts_that_does_not_divide_is_refused(self, on_ranks):
        message = on_ranks(3, _refused_on_rank, EXPERTS)[0]
        assert message == "'expert_parallel_size' must divide the experts of '1' (8), got 3."

    def test_model_without_experts_is_refused(self, on_ranks):
        assert on_ranks(2, _refused_on_rank, None)[0].startswith("'Sequential' must have experts stacked")

    def test_swapped_ids_and_weights_are_refused(self, on_ranks):
        message = on_ranks(2, _swapped_on_rank)[0]
        assert message.startswith(
            "'MixtralExperts' must take hidden states, integer expert ids and gate weights in"
        )
        assert "to be spread over ranks, got torch.float32. Choose a strategy" in message


class TestExpertMesh:
    def test_sizes(self, on_ranks):
        shapes, errors = on_ranks(4, _meshes_on_rank)[3]
        assert shapes == [(4, 1), (2, 2), (4,)]
        assert errors == [
            "'expert_parallel_size' must divide the data-parallel ranks (4), got 3.",
            "'expert_parallel_size' must be an integer >= 1, got 0.",
        ]


class TestPrecision:
    def test_bf16_autocast_sends_bf16_and_stays_close(self, on_ranks):
        for difference, dtype in on_ranks(2, _autocast_on_rank).values():
            assert dtype == "torch.bfloat16"
            assert difference < 0.02


class TestCheckpointing:
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_recomputation_gives_the_same_gradients(self, on_ranks, use_reentrant):
        for result in on_ranks(2, _checkpointed_on_rank, use_reentrant).values():
            assert result < 1e-6


class MoELayer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = MoEBlock(Router(8, EXPERTS, 2, score=Sigmoid()), GroupedExperts(EXPERTS, 8, 12))

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return x_TD + self.block(x_TD)


def _mesh(ranks: int):
    return init_device_mesh("cpu", (ranks,), mesh_dim_names=("data_parallel",))


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, in units of the largest value where that is above one."""
    if not expected.numel():
        return float(actual.numel())
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def _compare_on_rank(rank, results, layer, loads, size=None):
    results[rank] = {
        name: _difference_from_one_process(rank, layer, *load, size) for name, load in loads.items()
    }


def _difference_from_one_process(rank, layer, tokens, experts, size) -> float:
    """The largest in outputs, and in gradients of inputs, gates and experts."""
    torch.manual_seed(0)
    layer, ranks = copy.deepcopy(layer), len(tokens)
    batches = [
        routed_tokens(number, choice, min(2, len(choice)))
        for number, choice in zip(tokens, experts, strict=True)
    ]
    expected = [apply(layer, *batch) for batch in batches]
    directions = [torch.randn_like(y) for y in expected]
    sum((y * d).sum() / ranks for y, d in zip(expected, directions, strict=True)).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    x_TD, ids_TK, weights_TK = batches[rank]
    inputs = [x_TD.grad * ranks, weights_TK.grad * ranks]
    x_TD.grad = weights_TK.grad = None
    layer.zero_grad()

    parallelize_experts_(layer, expert_mesh(_mesh(ranks), size or ranks))
    actual = apply(layer, x_TD, ids_TK, weights_TK)
    (actual * directions[rank]).sum().backward()
    pairs = [(actual, expected[rank]), (x_TD.grad, inputs[0]), (weights_TK.grad, inputs[1])]
    pairs += [(p.grad.full_tensor(), gradients[name]) for name, p in layer.named_parameters()]
    return max(_difference(a, b) for a, b in pairs)


def _storage_on_rank(rank, results):
    layer = GroupedExperts(EXPERTS, 8, 12)
    parallelize_experts_(layer, _mesh(2))
    local = layer.gate_up.to_local()
    is_part = isinstance(layer.gate_up, DTensor) and layer.gate_up.placements == (Shard(0),)
    is_part = is_part and local.untyped_storage().nbytes() == local.numel() * 4
    results[rank] = len(local), is_part, list(layer.state_dict())


def _twice_on_rank(rank, results):
    layer, mesh = GroupedExperts(EXPERTS, 8, 12), _mesh(2)
    first = parallelize_experts_(layer, mesh)
    results[rank] = parallelize_experts_(layer, mesh) == first


def _refused_on_rank(rank, results, num_experts):
    layers = [torch.nn.Linear(8, 8)] + ([GroupedExperts(num_experts, 8, 12)] if num_experts else [])
    try:
        parallelize_experts_(torch.nn.Sequential(*layers), _mesh(torch.distributed.get_world_size()))
    except ConfigError as error:
        results[rank] = str(error)


def _swapped_on_rank(rank, results):
    layer = expert_layer("mixtral")
    parallelize_experts_(layer, _mesh(2))
    x_TD, ids_TK, weights_TK = routed_tokens(3, ALL)
    try:
        layer(x_TD, weights_TK, ids_TK)
    except ConfigError as error:
        results[rank] = str(error)


def _meshes_on_rank(rank, results):
    mesh = _mesh(4)
    shapes, errors = [tuple(expert_mesh(mesh, size).shape) for size in (1, 2, 4)], []
    for size in (3, 0):
        with pytest.raises(ConfigError) as caught:
            expert_mesh(mesh, size)
        errors.append(str(caught.value))
    results[rank] = shapes, errors


def _autocast_on_rank(rank, results):
    torch.manual_seed(0)
    layer, batch = expert_layer("ours"), routed_tokens(6, ALL)
    with torch.autocast("cpu", torch.bfloat16):
        expected = apply(layer, *batch)
        parallelize_experts_(layer, _mesh(2))
        actual = apply(layer, *batch)
    actual.sum().backward()
    results[rank] = _difference(actual, expected), str(actual.dtype)


def _checkpointed_on_rank(rank, results, use_reentrant):
    torch.manual_seed(0)
    layer = MoELayer()
    mesh = _mesh(2)
    fully_shard(layer, mesh=mesh, ignored_params=parallelize_experts_(layer, mesh))
    x_TD = torch.randn(6 - rank, 8, requires_grad=True)
    gradients = []
    for checkpointed in (False, True):
        layer.zero_grad()
        y_TD = checkpoint(layer, x_TD, use_reentrant=use_reentrant) if checkpointed else layer(x_TD)
        y_TD.square().sum().backward()
        gradients.append([parameter.grad.full_tensor().clone() for parameter in layer.parameters()])
    results[rank] = max(_difference(a, b) for a, b in zip(*gradients, strict=True))
