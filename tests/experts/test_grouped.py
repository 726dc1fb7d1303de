from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_plugin.errors import ConfigError
from moe_plugin.experts import GroupedExperts
from moe_plugin.experts.kernels import dtypes
from moe_plugin.types import Routing


def random_routing(
    num_tokens: int, num_experts: int, top_k: int, dtype: torch.dtype = torch.float32
) -> Routing:
    scores_TE = torch.rand(num_tokens, num_experts, dtype=dtype)
    weights_TK, ids_TK = scores_TE.topk(top_k)
    return Routing(weights_TK.detach().requires_grad_(), ids_TK, scores_TE)


def reference(experts: GroupedExperts, x_TD: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Token by token, expert by expert."""
    hidden_dim = experts.down.shape[1]
    tokens = []
    for x_D, weights_K, ids_K in zip(x_TD, routing.weights_TK, routing.expert_ids_TK.tolist(), strict=True):
        total = torch.zeros_like(x_D)
        for weight, expert in zip(weights_K, ids_K, strict=True):
            gate_up = x_D @ experts.gate_up[expert]
            gate, up = gate_up[:hidden_dim], gate_up[hidden_dim:]
            total = total + weight * ((gate * torch.sigmoid(gate) * up) @ experts.down[expert])
        tokens.append(total)
    return torch.stack(tokens)


def assert_matches_reference(
    experts: GroupedExperts, x_TD: torch.Tensor, routing: Routing, tolerance: float
) -> None:
    """Output and all gradients, against fp64."""
    experts64, x64 = copy.deepcopy(experts).double(), x_TD.detach().double().requires_grad_()
    routing64 = routing._replace(weights_TK=routing.weights_TK.detach().double().requires_grad_())
    actual, expected = experts(x_TD, routing), reference(experts64, x64, routing64)
    gradient = torch.randn_like(actual)
    actual.backward(gradient)
    expected.backward(gradient.double())
    pairs = [
        (actual, expected),
        (x_TD.grad, x64.grad),
        (routing.weights_TK.grad, routing64.weights_TK.grad),
        (experts.gate_up.grad, experts64.gate_up.grad),
        (experts.down.grad, experts64.down.grad),
    ]
    for a, b in pairs:
        torch.testing.assert_close(a.double(), b, atol=tolerance, rtol=tolerance)


class TestForward:
    @settings(max_examples=15, deadline=None)
    @given(
        seed=st.integers(0, 2**31),
        num_tokens=st.integers(1, 9),
        top_k=st.integers(1, 4),
        dim=st.sampled_from([8, 5]),
        hidden_dim=st.sampled_from([12, 3]),
    )
    def test_random_routing_matches_reference(self, seed, num_tokens, top_k, dim, hidden_dim):
        torch.manual_seed(seed)
        experts = GroupedExperts(6, dim, hidden_dim)
        x_TD = torch.randn(num_tokens, dim, requires_grad=True)
        assert_matches_reference(experts, x_TD, random_routing(num_tokens, 6, top_k), 1e-4)

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
    @pytest.mark.parametrize("emulated", [False, True])
    def test_half_precision_matches_reference(self, monkeypatch, dtype, tolerance, emulated):
        monkeypatch.setattr(dtypes, "EMULATED_BY_CPU", {torch.float16, torch.bfloat16} if emulated else set())
        experts = GroupedExperts(4, 16, 8).to(dtype)
        x_TD = torch.randn(10, 16, dtype=dtype, requires_grad=True)
        assert experts(x_TD, random_routing(10, 4, 2)).dtype == dtype
        assert_matches_reference(experts, x_TD, random_routing(10, 4, 2), tolerance)

    def test_all_tokens_on_one_expert_matches_reference(self):
        experts, x_TD = GroupedExperts(4, 8, 8), torch.randn(7, 8, requires_grad=True)
        routing = Routing(torch.rand(7, 1, requires_grad=True), torch.full((7, 1), 2), torch.rand(7, 4))
        assert_matches_reference(experts, x_TD, routing, 1e-4)
        others = [0, 1, 3]
        assert torch.equal(experts.gate_up.grad[others], torch.zeros(3, 8, 16))
        assert torch.equal(experts.down.grad[others], torch.zeros(3, 8, 8))

    def test_no_token_gives_zero_gradients(self):
        experts = GroupedExperts(4, 8, 8)
        y_TD = experts(torch.randn(0, 8), random_routing(0, 4, 2))
        y_TD.sum().backward()
        assert y_TD.shape == (0, 8)
        assert torch.equal(experts.gate_up.grad, torch.zeros_like(experts.gate_up))
        assert torch.equal(experts.down.grad, torch.zeros_like(experts.down))

    def test_expanded_gradient_is_accepted(self):
        experts = GroupedExperts(4, 8, 8)
        experts(torch.randn(6, 8), random_routing(6, 4, 2)).sum().backward()
        assert experts.down.grad.isfinite().all()

    def test_fp64_passes_gradcheck(self):
        experts, routing = GroupedExperts(3, 4, 3).double(), random_routing(5, 3, 2, torch.float64)
        x_TD = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

        def forward(x_TD, weights_TK, gate_up, down):
            parameters = {"gate_up": gate_up, "down": down}
            replaced = routing._replace(weights_TK=weights_TK)
            return torch.func.functional_call(experts, parameters, (x_TD, replaced))

        assert torch.autograd.gradcheck(forward, (x_TD, routing.weights_TK, experts.gate_up, experts.down))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_computes_in_its_dtype_and_keeps_fp32_gradients(self, dtype):
        experts, x_TD, routing = GroupedExperts(4, 16, 8), torch.randn(10, 16), random_routing(10, 4, 2)
        with torch.autocast("cpu", dtype=dtype):
            y_TD = experts(x_TD, routing)
        y_TD.sum().backward()
        assert y_TD.dtype == dtype
        assert experts.gate_up.grad.dtype == torch.float32
        torch.testing.assert_close(y_TD.float(), experts(x_TD, routing), atol=0.1, rtol=0.1)

    @pytest.mark.parametrize("emulated", [False, True])
    def test_autocast_on_cpu_keeps_no_copy_of_weights_for_the_backward(self, monkeypatch, emulated):
        monkeypatch.setattr(dtypes, "EMULATED_BY_CPU", {torch.float16, torch.bfloat16} if emulated else set())
        experts, saved = GroupedExperts(4, 16, 8), []
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor),
        ):
            experts(torch.randn(10, 16), random_routing(10, 4, 2))
        kept = {tensor.data_ptr() for tensor in saved if tensor is not None}
        assert {weights.data_ptr() for weights in experts.parameters()} <= kept

    def test_autocast_equals_weights_cast_before(self, monkeypatch):
        monkeypatch.setattr(dtypes, "EMULATED_BY_CPU", set())
        experts, x_TD, routing = GroupedExperts(4, 16, 8), torch.randn(30, 16), random_routing(30, 4, 2)
        narrow = copy.deepcopy(experts).bfloat16()
        expected = narrow(x_TD.bfloat16(), routing)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = experts(x_TD, routing)
        assert torch.equal(actual, expected)
        for y_TD in (actual, expected):
            y_TD.sum().backward()
        for one, other in zip(experts.parameters(), narrow.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad.float())


class TestParameters:
    def test_materialised_from_meta_is_drawn_anew(self):
        with torch.device("meta"):
            experts = GroupedExperts(4, 64, 256, residual_gain=0.5)
        experts.to_empty(device="cpu").reset_parameters()
        assert experts.gate_up.std().item() == pytest.approx(64**-0.5, rel=0.05)
        assert experts.down.std().item() == pytest.approx(0.5 * 256**-0.5, rel=0.05)

    @pytest.mark.parametrize("name", ["num_experts", "dim", "hidden_dim"])
    def test_size_not_positive_is_named(self, name):
        sizes = {"num_experts": 4, "dim": 8, "hidden_dim": 8} | {name: 0}
        with pytest.raises(ConfigError, match=f"'{name}' must be an integer >= 1, got 0"):
            GroupedExperts(**sizes)

    def test_repr_shows_sizes(self):
        assert repr(GroupedExperts(4, 8, 12)) == "GroupedExperts(num_experts=4, dim=8, hidden_dim=12)"
