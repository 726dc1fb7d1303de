from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from moe_plugin.experts import GroupedExperts, fused
from moe_plugin.experts.kernels import dtypes, grouped_products
from moe_plugin.experts.kernels import row_batches as batches_file
from moe_plugin.experts.kernels import row_blocks as blocks_file
from moe_plugin.experts.kernels.batched_products import backward_in_batches, forward_in_batches
from moe_plugin.experts.kernels.choice import TORCH, triton_kernels
from moe_plugin.experts.kernels.dispatch import order_pairs
from moe_plugin.experts.kernels.grouped_products import backward_by_groups, forward_by_groups
from moe_plugin.experts.kernels.row_batches import lay_out
from moe_plugin.experts.kernels.row_blocks import backward_in_blocks, blocks, forward_in_blocks
from moe_plugin.types import Routing
from tests.experts.kernels.cases import INTERPRETED

T, D, H, E, K = 24, 16, 8, 6, 3


def inputs(seed: int = 0, tokens: int = T, *, varying: bool = False, skewed: bool = False) -> tuple:
    torch.manual_seed(seed)
    scores_TE = torch.rand(tokens, E) - (skewed * torch.arange(E))
    ids_TK = scores_TE.topk(K).indices
    used_TK = torch.rand(tokens, K) < 0.6 if varying else None
    pair_ids_P, offsets_E = order_pairs(ids_TK, E, used_TK)
    x_TD, weights_TK = torch.randn(tokens, D), torch.rand(tokens, K)
    return x_TD, weights_TK, torch.randn(E, D, 2 * H), torch.randn(E, H, D), pair_ids_P.int(), offsets_E


def routing(tokens: int = T) -> Routing:
    scores_TE = torch.rand(tokens, E)
    weights_TK, ids_TK = scores_TE.topk(K)
    return Routing(weights_TK.requires_grad_(), ids_TK, scores_TE)


class TestImplementations:
    @settings(max_examples=25, deadline=None)
    @given(
        seed=st.integers(0, 2**31),
        tokens=st.sampled_from([0, 1, 7, 24]),
        varying=st.booleans(),
        skewed=st.booleans(),
        rows=st.sampled_from([1, 5, 2048]),
        transposed=st.booleans(),
    )
    def test_blocks_and_groups_give_the_same(self, seed, tokens, varying, skewed, rows, transposed):
        *given, offsets_E = inputs(seed, tokens, varying=varying, skewed=skewed)
        if transposed:  # as views into weights of a host
            given[2:4] = (weights.mT.contiguous().mT for weights in given[2:4])
        gradient_TD = torch.randn(tokens, D)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks_file, "ROWS", rows)
            y_TD, gate_up_P = forward_in_blocks(*given, ends=offsets_E.tolist())
            gradients = backward_in_blocks(gradient_TD, *given, ends=offsets_E.tolist(), gate_up_P=gate_up_P)
        y2_TD, gate_up2_P = forward_by_groups(*given, offsets_E)
        gradients2 = backward_by_groups(gradient_TD, *given, offsets_E, gate_up2_P)
        for one, other in zip((y_TD, gate_up_P, *gradients), (y2_TD, gate_up2_P, *gradients2), strict=True):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)
        for results in (gradients, gradients2):
            assert [x.stride() for x in results[2:]] == [weights.stride() for weights in given[2:4]]

    @settings(max_examples=25, deadline=None)
    @given(
        seed=st.integers(0, 2**31),
        tokens=st.sampled_from([0, 1, 7, 24, 200]),
        varying=st.booleans(),
        skewed=st.booleans(),
        rows=st.sampled_from([1, 32, 4096]),
        strides=st.sampled_from(["contiguous", "transposed", "every second"]),
    )
    def test_batches_and_groups_give_the_same(self, seed, tokens, varying, skewed, rows, strides):
        *given, offsets_E = inputs(seed, tokens, varying=varying, skewed=skewed)
        if strides == "transposed":
            given[2:4] = (weights.mT.contiguous().mT for weights in given[2:4])
        elif strides == "every second":
            given[2:4] = (weights.repeat_interleave(2, dim=-1)[..., ::2] for weights in given[2:4])
        gradient_TD, ends = torch.randn(tokens, D), offsets_E.tolist()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(batches_file, "ROWS", rows)
            y_TD, gate_up_P = forward_in_batches(*given, ends)
            gradients = backward_in_batches(gradient_TD, *given, ends, gate_up_P)
        y2_TD, gate_up2_P = forward_by_groups(*given, offsets_E)
        gradients2 = backward_by_groups(gradient_TD, *given, offsets_E, gate_up2_P)
        for one, other in zip((y_TD, *gradients), (y2_TD, *gradients2), strict=True):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)
        assert gate_up_P.shape == gate_up2_P.shape
        if strides != "every second":
            assert [x.stride() for x in gradients[2:]] == [weights.stride() for weights in given[2:4]]

    def test_in_batches_an_infinite_token_reaches_its_own_experts_only(self):
        x_TD, *given, offsets_E = inputs()
        ends = offsets_E.tolist()
        x_TD[0] = torch.inf
        y_TD, gate_up_P = forward_in_batches(x_TD, *given, ends)
        _, _, dgate_up, _ = backward_in_batches(torch.randn(T, D), x_TD, *given, ends, gate_up_P)
        assert not y_TD[0].isfinite().all()
        assert y_TD[1:].isfinite().all()
        expert_of_P = torch.arange(E).repeat_interleave(
            offsets_E.diff(prepend=torch.zeros(1, dtype=torch.int32))
        )
        pair_ids_P = given[-1]
        theirs = set(expert_of_P[pair_ids_P // K == 0].tolist())
        assert {expert for expert in range(E) if not dgate_up[expert].isfinite().all()} == theirs

    @pytest.mark.parametrize("emulated", [False, True])
    def test_half_precision_is_in_batches_where_the_cpu_has_it(self, monkeypatch, emulated):
        monkeypatch.setattr(dtypes, "EMULATED_BY_CPU", dtypes.HALVES if emulated else frozenset())
        for name in ("forward_in_batches", "backward_in_batches"):
            run = getattr(fused, name)
            monkeypatch.setattr(
                fused, name, lambda *given, run=run, **named: ran.append(run) or run(*given, **named)
            )
        ran = []
        for dtype in (torch.float32, torch.bfloat16):
            GroupedExperts(E, D, H).to(dtype)(
                torch.randn(T, D, dtype=dtype), routing()
            ).float().sum().backward()
        assert ran == ([] if emulated else [forward_in_batches, backward_in_batches])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("varying", [False, True])
    @pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
    def test_groups_give_the_same_with_triton(self, monkeypatch, dtype, varying):
        pytest.importorskip("triton", reason="needs Triton: pip install 'moe_plugin[triton]'")
        *given, offsets_E = inputs(varying=varying)
        given = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in given]
        gradient_TD, results = torch.randn(T, D).to(dtype), []
        for kernels in (TORCH, triton_kernels()):
            monkeypatch.setattr(grouped_products, "kernels_for", lambda _, kernels=kernels: kernels)
            y_TD, gate_up_P = forward_by_groups(*given, offsets_E)
            results.append((y_TD, *backward_by_groups(gradient_TD, *given, offsets_E, gate_up_P)))
        torch.testing.assert_close(*results)

    @settings(max_examples=50, deadline=None)
    @given(sizes=st.lists(st.integers(0, 6000), min_size=1, max_size=9))
    def test_blocks_cover_every_row_once_and_are_bounded(self, sizes):
        ends = torch.tensor(sizes).cumsum(0).tolist()
        covered, position = [0] * len(sizes), 0
        for rows, pieces in blocks(ends, torch.float32):
            assert rows.start == position
            assert rows.stop - rows.start == sum(size for _, size in pieces) <= blocks_file.ROWS
            position = rows.stop
            for expert, size in pieces:
                covered[expert] += size
        assert covered == sizes


class TestUnwanted:
    @pytest.mark.parametrize("wanted", list(product([False, True], repeat=4)))
    def test_products_of_what_is_not_wanted_are_left_out(self, wanted):
        *given, offsets_E = inputs()
        gradient_TD = torch.randn(T, D)
        _, gate_up_P = forward_by_groups(*given, offsets_E)
        for run, ends, product_of in (
            (backward_by_groups, offsets_E, "_grouped_mm"),
            (backward_in_blocks, offsets_E.tolist(), "aten.mm"),
            (backward_in_batches, offsets_E.tolist(), "aten.bmm"),
        ):
            everything = run(gradient_TD, *given, ends, gate_up_P)
            with _Names() as seen:
                gradients = run(gradient_TD, *given, ends, gate_up_P, wanted)
            for gradient, full, is_wanted in zip(gradients, everything, wanted, strict=True):
                assert torch.equal(gradient, full) if is_wanted else gradient.numel() == 0
            products = sum(product_of in name for name in seen.names)
            each = {
                backward_by_groups: 1,
                backward_in_blocks: int(offsets_E.diff(prepend=torch.zeros(1)).count_nonzero()),
                backward_in_batches: len(lay_out(given[-1], offsets_E.tolist()).batches),
            }[run]
            assert products == each * (1 + wanted[0] + wanted[2] + wanted[3])

    @pytest.mark.parametrize("frozen", [("gate_up",), ("down",), ("gate_up", "down")])
    @pytest.mark.parametrize("of_input", [False, True])
    def test_frozen_experts_get_no_gradient_and_the_rest_the_same(self, monkeypatch, frozen, of_input):
        torch.manual_seed(0)
        experts, x_TD, decisions, results = GroupedExperts(E, D, H), torch.randn(T, D), routing(), []
        asked = _asked(monkeypatch)
        for names in ((), frozen):
            for name, parameter in experts.named_parameters():
                parameter.grad = None
                parameter.requires_grad_(name not in names)
            x_TD, decisions.weights_TK.grad = x_TD.detach().requires_grad_(of_input), None
            with FlopCounterMode(display=False) as flops:
                experts(x_TD, decisions).square().sum().backward()
            gradients = {name: parameter.grad for name, parameter in experts.named_parameters()}
            results.append({**gradients, "x": x_TD.grad, "weights": decisions.weights_TK.grad})
        everything, some = results
        assert [name for name, gradient in some.items() if gradient is None] == [
            *frozen,
            *(["x"] * (not of_input)),
        ]
        assert all(
            torch.equal(gradient, everything[name]) for name, gradient in some.items() if gradient is not None
        )
        wanted = [of_input, True, "gate_up" not in frozen, "down" not in frozen]
        assert asked == [[of_input, True, True, True], wanted]
        of_down = 2 * T * K * D * H
        forward, backward = 3 * of_down, of_down * (2 * (wanted[0] + wanted[2]) + 1 + wanted[3])
        assert flops.get_total_flops() == forward + backward


def _asked(monkeypatch) -> list[list[bool]]:
    """Which gradients each backward is asked for, from now on."""
    asked, run = [], fused.run_backward

    def noted(*given):
        asked.append(list(given[-1]))
        found = run(*given)
        assert [gradient.numel() > 0 for gradient in found] == asked[-1]
        return found

    monkeypatch.setattr(fused, "run_backward", noted)
    return asked


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class TestCost:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_only_input_and_pre_activation_are_saved(self, dtype):
        tokens, width, hidden = 64, 32, 64
        experts = GroupedExperts(E, width, hidden).to(dtype)
        x_TD, saved = torch.randn(tokens, width, dtype=dtype, requires_grad=True), []
        parameters = {p.untyped_storage().data_ptr() for p in (*experts.parameters(), x_TD)}

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in parameters:
                saved.append(tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            experts(x_TD, routing(tokens))
        assert sum(saved) <= 1.05 * tokens * K * 2 * hidden * dtype.itemsize

    def test_groups_never_wait_for_the_device(self):
        *given, offsets_E = inputs()
        with _Names() as seen:
            _, gate_up_P = forward_by_groups(*given, offsets_E)
            backward_by_groups(torch.randn(T, D), *given, offsets_E, gate_up_P)
        # One for each projection and, in the backward, for each of its two gradients; no loop over experts.
        assert sum("_grouped_mm" in name for name in seen.names) == 2 + 2 * 2
        assert len(seen.names) <= 70  # 66 when written: each may be a launch
        assert not [
            name for name in seen.names if "item" in name or "local_scalar" in name or "nonzero" in name
        ]


class TestCompile:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated.*:DeprecationWarning")
    def test_one_graph_gives_the_same_whatever_the_loads(self, dtype):
        torch.compiler.reset()
        experts = GroupedExperts(E, D, H).to(dtype)
        compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(3):
                x_TD, decisions = torch.randn(T, D, dtype=dtype), routing()
                torch.testing.assert_close(compiled(x_TD, decisions), experts(x_TD, decisions))
                compiled(x_TD, decisions).float().sum().backward()

    @pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated.*:DeprecationWarning")
    def test_frozen_experts_are_one_graph_too(self):
        torch.compiler.reset()
        experts = GroupedExperts(E, D, H).requires_grad_(False)
        compiled, results = torch.compile(experts, fullgraph=True, backend="aot_eager"), []
        for run in (experts, compiled):
            torch.manual_seed(0)
            x_TD, decisions = torch.randn(T, D, requires_grad=True), routing()
            run(x_TD, decisions).square().sum().backward()
            results.append((x_TD.grad, decisions.weights_TK.grad))
        torch.testing.assert_close(*results)
        assert experts.gate_up.grad is None
