from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from moe_plugin.experts import Linear, SwiGLU
from moe_plugin.experts.kernels import dtypes

TOKENS, INPUTS, OUTPUTS = 12, 16, 24
HALVES = {torch.bfloat16, torch.float16}
TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.01}


@pytest.fixture(params=[False, True], ids=["emulated", "native"])
def has_bf16(request, monkeypatch):
    monkeypatch.setattr(dtypes, "EMULATED_BY_CPU", {torch.float16} if request.param else HALVES)
    return request.param


def results(layer, x) -> list[torch.Tensor]:
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y.double().square().sum(), [x, layer.weight])]


def reference(layer, x) -> list[torch.Tensor]:
    x, weight = (tensor.detach().double().requires_grad_() for tensor in (x, layer.weight))
    y = functional.linear(x, weight)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, weight])]


class TestProductDtype:
    def test_half_precision_without_instructions_is_fp32(self, has_bf16):
        cpu, gpu = torch.device("cpu"), torch.device("cuda")
        assert dtypes.product_dtype(torch.bfloat16, cpu) == (torch.bfloat16 if has_bf16 else torch.float32)
        assert dtypes.product_dtype(torch.float16, cpu) == torch.float32
        for dtype in (torch.float32, torch.float64):
            assert dtypes.product_dtype(dtype, cpu) == dtype
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert dtypes.product_dtype(dtype, gpu) == dtype

    @pytest.mark.parametrize("avx512_bf16", [False, True])
    def test_avx512_without_bf16_instructions_counts_as_without(self, monkeypatch, avx512_bf16):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
        monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
        assert dtypes._cpu_has_bf16() == avx512_bf16

    def test_without_onednn_there_is_no_bf16(self, monkeypatch):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert not dtypes._cpu_has_bf16()


@pytest.mark.usefixtures("has_bf16")
class TestLinear:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("leading", [(), (TOKENS,), (3, 4), (0,)])
    def test_half_precision_matches_reference_and_keeps_its_dtype(self, dtype, leading):
        layer, x = (
            Linear(INPUTS, OUTPUTS).to(dtype),
            torch.randn(*leading, INPUTS, dtype=dtype, requires_grad=True),
        )
        for one, other in zip(results(layer, x), reference(layer, x), strict=True):
            assert one.dtype == dtype
            torch.testing.assert_close(one.double(), other, atol=0.1, rtol=TOLERANCE[dtype])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_gives_its_dtype_and_fp32_gradients(self, dtype):
        layer, x = Linear(INPUTS, OUTPUTS), torch.randn(TOKENS, INPUTS, requires_grad=True)
        with torch.autocast("cpu", dtype):
            y = layer(x)
        dx, dweight = torch.autograd.grad(y.double().square().sum(), [x, layer.weight])
        assert (y.dtype, dx.dtype, dweight.dtype) == (dtype, torch.float32, torch.float32)
        for one, other in zip((y, dx, dweight), reference(layer, x), strict=True):
            torch.testing.assert_close(one.double(), other, atol=0.3, rtol=TOLERANCE[dtype])

    def test_frozen_weight_and_frozen_input_have_no_gradient(self):
        layer, x = Linear(INPUTS, OUTPUTS).bfloat16(), torch.randn(TOKENS, INPUTS, dtype=torch.bfloat16)
        layer(x).sum().backward()
        assert layer.weight.grad is not None
        assert x.grad is None
        layer.requires_grad_(False).zero_grad()
        layer(x.requires_grad_()).sum().backward()
        assert layer.weight.grad is None
        assert x.grad is not None

    def test_only_inputs_and_weights_are_saved(self):
        layer, x, saved = (
            Linear(INPUTS, OUTPUTS).bfloat16(),
            torch.randn(TOKENS, INPUTS, dtype=torch.bfloat16),
            [],
        )
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
            layer(x.requires_grad_())
        assert {tensor.data_ptr() for tensor in saved} == {x.data_ptr(), layer.weight.data_ptr()}

    @pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated.*:DeprecationWarning")
    def test_compiles_into_one_graph(self):
        layer, x = (
            SwiGLU(INPUTS, OUTPUTS).bfloat16(),
            torch.randn(TOKENS, INPUTS, dtype=torch.bfloat16, requires_grad=True),
        )
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))
        compiled(x).sum().backward()
        assert x.grad.isfinite().all()
