"""That a step does not wait for its device, shown without one: meta tensors have no values that could be read.

What `grouped_mm` does within is not seen here; `test_cuda.py` sees it, on a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_plugin import balance_
from moe_plugin.attach.balanced_model import BalancedModel
from moe_plugin.experts import GroupedExperts, MoEBlock, SwiGLU
from moe_plugin.experts.kernels.dispatch import order_pairs
from moe_plugin.experts.kernels.grouped_products import backward_by_groups, forward_by_groups
from moe_plugin.routing import Router, Sigmoid, SoftmaxBeforeTopK

T, D, H, E, K = 24, 16, 32, 6, 3


class Crossings(TorchDispatchMode):
    """Notes operations with tensors on more than one device: a copy to the device waits as one from it does."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, out))
        if len({leaf.device for leaf in leaves if isinstance(leaf, Tensor)}) > 1:
            self.names.append(str(func))
        return out


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast knows no such device, and the first update looks whether tokens were counted."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(BalancedModel, "_check_effect", lambda *_: None)


class TestTrainingStep:
    @pytest.mark.usefixtures("on_meta")
    @pytest.mark.parametrize("score", [Sigmoid(), SoftmaxBeforeTopK()], ids=["sigmoid", "softmax"])
    @pytest.mark.parametrize(("num_groups", "top_k_groups"), [(1, 1), (3, 2)])
    def test_of_a_balanced_block_reads_and_copies_nothing(
        self, score: Any, num_groups: int, top_k_groups: int
    ) -> None:
        with torch.device("meta"):
            groups = {"num_groups": num_groups, "top_k_groups": top_k_groups}
            router = Router(D, E, K, score=score, normalize=True, **groups)
            model = nn.Sequential(MoEBlock(router, GroupedExperts(E, D, H), SwiGLU(D, H)))
            batches = torch.randn(4, T, D).unbind()
        balanced, optimizer, crossings = balance_(model), torch.optim.AdamW(model.parameters()), []
        for x_TD in batches:
            with Crossings() as seen:
                model(x_TD).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                balanced.update()
            crossings.append(len(seen.names))
        assert crossings[0] > 0, "counting moves to the device in the first step"
        assert crossings[1:] == [0] * 3


class TestGroupedProducts:
    def test_in_bf16_read_and_copy_nothing(self) -> None:
        with torch.device("meta"):
            floats = [torch.randn(T, D), torch.rand(T, K), torch.randn(E, D, 2 * H), torch.randn(E, H, D)]
            x_TD, *others = (each.bfloat16() for each in floats)
            ids_TK = torch.rand(T, E).topk(K).indices
        with Crossings() as seen:
            pair_ids_P, offsets_E = order_pairs(ids_TK, E)
            given = x_TD, *others, pair_ids_P.int(), offsets_E
            y_TD, gate_up_P = forward_by_groups(*given)
            gradients = backward_by_groups(y_TD, *given, gate_up_P)
        assert not seen.names
        assert [each.shape for each in (y_TD, *gradients)] == [each.shape for each in (x_TD, x_TD, *others)]
