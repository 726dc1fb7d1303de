"""The expert layer on a GPU: what it computes, and that a training step does not wait for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_plugin import balance_
from moe_plugin.experts import GroupedExperts, MoEBlock, SwiGLU
from moe_plugin.experts.kernels import grouped_products
from moe_plugin.experts.kernels.choice import VARIABLE
from moe_plugin.experts.kernels.dispatch import order_pairs
from moe_plugin.experts.kernels.grouped_products import backward_by_groups, forward_by_groups
from moe_plugin.experts.kernels.row_blocks import backward_in_blocks, forward_in_blocks
from moe_plugin.routing import Router, Sigmoid

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning"),
]

T, D, H, E, K = 256, 64, 128, 8, 2
KERNELS = ["torch", "triton"]


@pytest.fixture(params=KERNELS, autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "triton":
        pytest.importorskip("triton", reason="needs Triton: pip install 'moe_plugin[triton]'")
    monkeypatch.setenv(VARIABLE, request.param)
    return request.param


@pytest.fixture
def waiting_is_an_error() -> Iterator[Callable[[], None]]:
    """Call it when the first steps are done, which prepare and check."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def let_grouped_mm_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has no kernel for a grouped product it reads the offsets on the host, whoever calls it."""
    grouped_mm = torch.nn.functional.grouped_mm

    def waiting(*args: Any, **kwargs: Any) -> Tensor:
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        try:
            return grouped_mm(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    monkeypatch.setattr(grouped_products.functional, "grouped_mm", waiting)


def has_grouped_kernel(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and torch.cuda.get_device_capability()[0] in (9, 10)


def balanced_block() -> nn.Module:
    router = Router(D, E, K, score=Sigmoid(), normalize=True)
    return nn.Sequential(MoEBlock(router, GroupedExperts(E, D, H), SwiGLU(D, H))).cuda()


class TestTrainingStep:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_never_waits_for_the_device(
        self, monkeypatch: pytest.MonkeyPatch, waiting_is_an_error: Callable[[], None], dtype: torch.dtype
    ) -> None:
        if not has_grouped_kernel(dtype):
            let_grouped_mm_wait(monkeypatch)
        model = balanced_block()
        balanced, optimizer = balance_(model), torch.optim.AdamW(model.parameters())
        batches = torch.randn(5, T, D, device="cuda").unbind()
        losses = []
        for number, x_TD in enumerate(batches):
            if number == 2:
                waiting_is_an_error()
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                loss = (model(x_TD).float() - x_TD).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            balanced.update()
            losses.append(loss.detach())
        torch.cuda.set_sync_debug_mode("default")
        assert torch.stack(losses).isfinite().all()
        assert all(counts.sum() == T * K for counts in balanced.record.counts.values())


def on_cuda(dtype: torch.dtype, *, varying: bool) -> tuple[list[Tensor], Tensor]:
    """What the experts are given, and the gradient of what they give; half of the experts get no token."""
    torch.manual_seed(0)
    scores_TE = torch.rand(T, E) - torch.arange(E).ge(E // 2).float()
    used_TK = torch.rand(T, K) < 0.6 if varying else None
    pair_ids_P, offsets_E = order_pairs(scores_TE.topk(K).indices, E, used_TK)
    gate_up, down = torch.randn(E, D, 2 * H) / D**0.5, torch.randn(E, H, D) / H**0.5
    floats = [each.to("cuda", dtype) for each in (torch.randn(T, D), torch.rand(T, K), gate_up, down)]
    return [*floats, pair_ids_P.int().cuda(), offsets_E.cuda()], torch.randn(T, D).to("cuda", dtype)


class TestGroupedProducts:
    @pytest.mark.parametrize("varying", [False, True])
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05), (torch.float16, 0.01)]
    )
    def test_match_a_loop_over_the_experts_in_fp64(
        self, dtype: torch.dtype, tolerance: float, varying: bool
    ) -> None:
        (*given, offsets_E), gradient_TD = on_cuda(dtype, varying=varying)
        y_TD, gate_up_P = forward_by_groups(*given, offsets_E)
        actual = (y_TD, *backward_by_groups(gradient_TD, *given, offsets_E, gate_up_P))
        exact = [each.cpu().double() if each.is_floating_point() else each.cpu() for each in given]
        ends = offsets_E.tolist()
        y_TD, gate_up_P = forward_in_blocks(*exact, ends=ends)
        gradients = backward_in_blocks(gradient_TD.cpu().double(), *exact, ends=ends, gate_up_P=gate_up_P)
        for one, other in zip(actual, (y_TD, *gradients), strict=True):
            torch.testing.assert_close(
                one.cpu().double(), other, atol=tolerance * float(other.abs().max()), rtol=tolerance
            )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_give_the_same_bits_each_time(self, dtype: torch.dtype) -> None:
        given, gradient_TD = on_cuda(dtype, varying=True)
        runs = []
        for _ in range(2):
            y_TD, gate_up_P = forward_by_groups(*given)
            runs.append((y_TD, *backward_by_groups(gradient_TD, *given, gate_up_P)))
        assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
