from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_plugin.apps.models.rms_norm import RMSNorm


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def norms(request: pytest.FixtureRequest) -> tuple[RMSNorm, nn.RMSNorm]:
    """Ours and torch's, of the same weights."""
    ours, reference = RMSNorm(12), nn.RMSNorm(12)
    nn.init.uniform_(ours.weight, 0.5, 1.5)
    reference.load_state_dict(ours.state_dict())
    return ours.to(request.param), reference.to(request.param)


class TestRMSNorm:
    @pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
    @pytest.mark.parametrize("shape", [(), (0,), (2, 5)])
    def test_output_and_gradients_match_torch(self, norms, scale, shape):
        found = []
        x = scale * torch.randn(*shape, 12, dtype=norms[0].weight.dtype)
        gradient = torch.randn_like(x)
        for norm in norms:
            leaf = x.clone().requires_grad_()
            y = norm(leaf)
            y.backward(gradient)
            found.append((y, scale * leaf.grad, norm.weight.grad))
        close = {} if x.dtype == torch.bfloat16 else {"atol": 1e-6, "rtol": 1e-5}
        torch.testing.assert_close(found[0], found[1], **close)

    @pytest.mark.parametrize("frozen", ["x", "weight", None])
    def test_gradients_match_differences(self, frozen):
        norm = RMSNorm(6, eps=1e-3).double()
        x = torch.randn(3, 6, dtype=torch.float64, requires_grad=frozen != "x")
        norm.weight.requires_grad_(frozen != "weight")
        assert torch.autograd.gradcheck(lambda x, _: norm(x), (x, norm.weight))

    def test_zeros_stay_zeros_with_finite_gradients(self):
        norm, x = RMSNorm(4), torch.zeros(2, 4, requires_grad=True)
        y = norm(x)
        y.sum().backward()
        assert not y.any()
        assert torch.isfinite(x.grad).all()

    def test_autocast_around_backward_does_not_round_gradients(self):
        norm, x = RMSNorm(8), torch.randn(3, 8)
        gradients = []
        for autocasts in (False, True):
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
                norm(leaf).square().sum().backward()
            gradients.append(leaf.grad)
        assert torch.equal(*gradients)

    def test_other_devices_use_torchs_kernel(self):
        x = torch.randn(3, 8, device="meta", requires_grad=True)
        y = RMSNorm(8, device="meta")(x)
        assert y.shape == x.shape
        assert "_RMSNorm" not in type(y.grad_fn).__name__
