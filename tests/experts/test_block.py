from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from moe_plugin.experts import GroupedExperts, MoEBlock, SwiGLU
from moe_plugin.routing import Router, Sigmoid


@pytest.fixture
def block() -> MoEBlock:
    return MoEBlock(Router(8, 4, 2, score=Sigmoid()), GroupedExperts(4, 8, 12), SwiGLU(8, 12))


class TestMoEBlock:
    def test_output_is_routed_plus_shared(self, block):
        x = torch.randn(3, 5, 8)
        x_TD = x.view(15, 8)
        expected_TD = block.experts(x_TD, block.router(x_TD)) + block.shared(x_TD)
        torch.testing.assert_close(block(x), expected_TD.view(3, 5, 8))

    def test_without_shared_is_routed_only(self, block):
        block.shared = None
        x_TD = torch.randn(5, 8)
        torch.testing.assert_close(block(x_TD), block.experts(x_TD, block.router(x_TD)))

    def test_every_parameter_gets_a_gradient_from_one_token(self, block):
        block(torch.randn(1, 8)).sum().backward()
        assert all(parameter.grad is not None for parameter in block.parameters())

    def test_no_token_gives_every_parameter_a_gradient(self, block):
        y = block(torch.randn(2, 0, 8))
        assert y.shape == (2, 0, 8)
        y.sum().backward()
        assert all(parameter.grad is not None for parameter in block.parameters())

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_any_dtype_returns_its_own(self, block, dtype):
        assert block.to(dtype)(torch.randn(3, 8, dtype=dtype)).dtype == dtype

    def test_autocast_matches_fp32(self, block):
        x = torch.randn(3, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = block(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), block(x), atol=0.1, rtol=0.1)

    def test_transposed_input_is_accepted(self, block):
        x = torch.randn(5, 3, 8).transpose(0, 1)
        torch.testing.assert_close(block(x), block(x.contiguous()))

    def test_materialised_from_meta_runs(self):
        with torch.device("meta"):
            block = MoEBlock(Router(8, 4, 2, score=Sigmoid()), GroupedExperts(4, 8, 12), SwiGLU(8, 12))
        block.to_empty(device="cpu")
        for module in block.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        assert block(torch.randn(3, 8)).isfinite().all()


class TestSwiGLU:
    def test_output_matches_formula(self):
        network, x = SwiGLU(8, 12), torch.randn(3, 8)
        gate, up = network.gate_up.weight.split(12)
        expected = (functional.silu(x @ gate.T) * (x @ up.T)) @ network.down.weight.T
        torch.testing.assert_close(network(x), expected)
