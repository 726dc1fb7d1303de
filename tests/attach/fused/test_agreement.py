from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from moe_plugin.attach.fused.agreement import disagreement
from moe_plugin.attach.fused.projections import projections_of
from tests.stacked_hosts import InputFirstExperts, StackedExperts


class Gelu(StackedExperts):
    def gated(self, gate_NH, up_NH):
        return functional.gelu(gate_NH) * up_NH


class UpFirst(StackedExperts):
    def gated(self, gate_NH, up_NH):
        return super().gated(up_NH, gate_NH)


class Interleaved(StackedExperts):
    def gated(self, gate_NH, up_NH):
        both_NH = torch.cat([gate_NH, up_NH], -1)
        return super().gated(both_NH[:, ::2], both_NH[:, 1::2])


class Clamped(StackedExperts):
    limit = 100.0

    def gated(self, gate_NH, up_NH):
        return super().gated(gate_NH.clamp(max=self.limit), up_NH)


class Shifted(StackedExperts):
    def gated(self, gate_NH, up_NH):
        return super().gated(gate_NH, up_NH + 1)


class Scaled(StackedExperts):
    def compute(self, expert, x_ND):
        return 2 * super().compute(expert, x_ND)


class WeightedInputs(StackedExperts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        y_TD = torch.zeros_like(hidden_states)
        for k in range(top_k_index.shape[1]):
            x_TD = hidden_states * top_k_weights[:, k : k + 1]
            y_TD = y_TD + super().forward(
                x_TD, top_k_index[:, k : k + 1], torch.ones_like(top_k_weights[:, :1])
            )
        return y_TD


class DetachedWeights(StackedExperts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        straight_TK = top_k_weights + (top_k_weights - top_k_weights.detach())
        return super().forward(hidden_states, top_k_index, straight_TK)


class Failing(StackedExperts):
    def compute(self, expert, x_ND):
        raise RuntimeError("only on a GPU")


def verdict(kind):
    experts = kind()
    projections = projections_of(experts)
    assert not isinstance(projections, str)
    return disagreement(experts, projections)


class TestDisagreement:
    @pytest.mark.parametrize("kind", [StackedExperts, InputFirstExperts])
    def test_swiglu_experts_agree(self, kind):
        assert verdict(kind) == ""

    @pytest.mark.parametrize("kind", [Gelu, UpFirst, Interleaved, Shifted, Scaled, WeightedInputs])
    def test_other_computation_is_seen_at_small_activations(self, kind):
        assert "at activations of 1 its output differs" in verdict(kind)

    def test_limit_is_seen_at_large_activations(self):
        assert "at activations of 1e+06 its output differs" in verdict(Clamped)

    def test_other_gradient_is_seen_where_outputs_are_equal(self):
        assert "its gradient differs" in verdict(DetachedWeights)

    def test_forward_that_fails_is_reported_with_its_error(self):
        assert "cannot be run on random experts in fp64 on the CPU: RuntimeError('only on a GPU')" in verdict(
            Failing
        )

    def test_weights_of_zero_prove_nothing(self):
        experts = Gelu()
        torch.nn.init.zeros_(experts.down_proj)
        projections = projections_of(experts)
        assert "differs" in disagreement(experts, projections)

    @pytest.mark.parametrize("where", ["meta", "bf16", "autocast", "no_grad", "inference_mode"])
    def test_neither_device_nor_dtype_nor_mode_matters(self, where):
        good, bad = (
            kind().to("meta") if where == "meta" else kind().bfloat16() if where == "bf16" else kind()
            for kind in (StackedExperts, Gelu)
        )
        modes = {
            "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
            "no_grad": torch.no_grad,
            "inference_mode": torch.inference_mode,
        }
        with modes.get(where, torch.enable_grad)():
            assert disagreement(good, projections_of(good)) == ""
            assert "differs" in disagreement(bad, projections_of(bad))

    def test_nothing_is_left_behind(self):
        experts = StackedExperts()
        before, drawn = dict(vars(experts)), torch.get_rng_state()
        state = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
        disagreement(experts, projections_of(experts))
        assert vars(experts) == before
        assert experts.num_experts == 4
        assert all(torch.equal(tensor, state[name]) for name, tensor in experts.state_dict().items())
        assert torch.equal(torch.get_rng_state(), drawn)
