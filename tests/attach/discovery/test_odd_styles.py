"""What cannot be balanced without help is never silently left alone, and what is no router is not taken for one."""

from __future__ import annotations

import copy
from typing import cast

import pytest
import torch
from torch import nn

from moe_plugin.attach.adapter import Adapter
from moe_plugin.attach.balance import balance_
from moe_plugin.balancing.rules import Sign
from moe_plugin.errors import AttachError, EffectError
from tests.attach.discovery import odd_styles
from tests.attach.discovery.odd_styles import DOUBTFUL, NEED_ADAPTER, NO_ROUTERS, WithRouter
from tests.attach.discovery.wild_places import ForwardRouter
from tests.attach.discovery.wild_styles import D, E, TwoArgmaxes, Wild

TOKENS = 30


def named(blocks):
    return pytest.mark.parametrize("block", blocks, ids=lambda block: block.__name__)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def inputs():
    return torch.randn(3, TOKENS // 3, D)


def gates(block, select, scores_TE):
    weights_TK, ids_TK = select(scores_TE, block.k)
    return torch.zeros_like(scores_TE).scatter(1, ids_TK, weights_TK)


class TestNeedAdapter:
    @pytest.mark.parametrize(
        ("block", "reason"), NEED_ADAPTER.items(), ids=lambda each: getattr(each, "__name__", "")
    )
    def test_error_names_block_and_reason_and_what_to_do(self, block, reason):
        with pytest.raises(
            AttachError, match=f"'1': {block.__name__} {reason}.* Write an Adapter for that block"
        ):
            balance_(nn.Sequential(Wild(), block()))

    @named(NEED_ADAPTER)
    def test_adapter_of_three_lines_balances_it(self, block):
        blocks = block(), block()
        model = nn.Sequential(*blocks)
        adapter = Adapter(block=block, method="gates", route=gates, num_experts=E, top_k="k")
        balanced = balance_(model, Sign(rate=0.1), adapters=[adapter])
        x = inputs()
        for bias_E in (torch.zeros(E), torch.randn(E) / 3, torch.eye(E)[2] * 50):
            balanced["0"].bias.copy_(bias_E)
            torch.testing.assert_close(blocks[0](x), blocks[0].reference(x, bias_E))
        assert balanced["0"].counts.sum() == 3 * TOKENS * block.k
        assert balanced["0"].counts[2] >= TOKENS
        model(x).sum().backward()
        balanced.update()
        assert balanced["1"].bias.any()


class TestDoubtful:
    @named(DOUBTFUL)
    def test_alone_it_is_an_error(self, block):
        with pytest.raises(AttachError, match=f"'0': {block.__name__} looks like a block of experts"):
            balance_(nn.Sequential(block()))

    @named(DOUBTFUL)
    def test_beside_a_router_it_is_left_out_and_told(self, block, caplog):
        balanced = balance_(nn.Sequential(Wild(), block()))
        assert list(balanced) == ["0"]
        assert "was not seen to select any" in balanced.refused["1"]
        assert f"Not balanced: 1, {block.__name__}" in caplog.text

    def test_gate_of_a_routers_class_for_several_sets_of_experts_is_left_out_and_told(self, caplog):
        model = nn.Sequential(odd_styles.Hierarchical())
        balanced = balance_(model)
        model(inputs())
        assert list(balanced) == ["0.outer"]
        assert (
            "Gate is the class of router '0.outer', but was not seen to select" in balanced.refused["0.inner"]
        )
        assert "Not balanced: 0.inner, Gate is" in caplog.text

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_torchscript_is_left_out_and_told(self):
        block = torch.jit.trace(Wild(), inputs())
        assert isinstance(block, nn.Module)
        balanced = balance_(nn.Sequential(Wild(), block))
        assert balanced.refused == {"1": "Wild calls topk in TorchScript, where no bias reaches it"}


class TestNoRouters:
    @named(NO_ROUTERS)
    def test_module_that_ranks_something_else_is_not_taken_for_a_router(self, block):
        assert list(balance_(nn.Sequential(Wild(), block()))) == ["0"]
        with pytest.raises(AttachError, match="'adapters'"):
            balance_(nn.Sequential(block()))


class TestRefusedInTheFirstForward:
    @named((odd_styles.HostMovesItsBias, odd_styles.HostReplacesItsBias))
    def test_host_that_moves_its_own_bias_is_an_error(self, block):
        model = nn.Sequential(block())
        balance_(model)
        with pytest.raises(
            EffectError, match=r"Router '0' updates its own 'expert_bias' during forward.* Switch"
        ):
            model(inputs())

    @named((odd_styles.Checkpointed, odd_styles.CheckpointedReentrant))
    def test_selection_that_would_be_recomputed_without_the_bias_is_an_error(self, block):
        model = nn.Sequential(block())
        balance_(model)
        with pytest.raises(EffectError, match="checkpoints the part of its own forward that selects"):
            model(inputs().requires_grad_())

    def test_checkpointed_selection_is_balanced_with_an_adapter(self):
        block, x = odd_styles.Checkpointed(), inputs()
        adapter = Adapter(
            block=odd_styles.Checkpointed, method="gates", route=gates, num_experts=E, top_k="k"
        )
        plain = copy.deepcopy(block)
        site = balance_(block, adapters=[adapter])[""]
        site.bias.copy_(torch.randn(E))
        block(x).sum().backward()
        plain.reference(x, site.bias).sum().backward()
        torch.testing.assert_close(block.gate.weight.grad, plain.gate.weight.grad)
        assert site.counts.sum() == TOKENS * 2

    def test_lazy_modules_are_an_error_that_says_what_to_do(self):
        model = nn.Sequential(nn.LazyLinear(D), Wild())
        with pytest.raises(AttachError, match=r"'0.weight' has no size yet. Run the model on one batch"):
            balance_(model)


class TestPlaces:
    def test_router_shared_by_two_blocks_is_one_site(self):
        blocks = odd_styles.with_shared_router()
        balanced = balance_(blocks)
        for block in blocks:
            block(inputs())
        assert list(balanced) == ["0.router"]
        assert balanced["0.router"].counts.sum() == 2 * TOKENS * 2

    def test_whole_model_in_one_module_is_run_on_token_ids(self):
        model = odd_styles.WholeModel()
        balanced = balance_(model)
        model(torch.randint(0, 50, (3, 10)))
        assert [site.counts.sum() for site in balanced.values()] == [TOKENS * 2]

    @pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own, while compiling
    def test_compiled_parts_are_seen_through(self):
        block = cast("nn.Module", torch.compile(Wild(), backend="eager"))
        model = nn.Sequential(block, WithRouter(torch.compile(ForwardRouter(), backend="eager")))
        model(inputs())
        balanced = balance_(model)
        for site in balanced.values():
            site.bias[1] = 50.0
        model(inputs())
        assert list(balanced) == ["0._orig_mod", "1.router._orig_mod"]
        assert [site.counts[1] for site in balanced.values()] == [TOKENS] * 2

    def test_model_on_meta_device_is_understood_alike(self):
        with torch.device("meta"):
            model = nn.Sequential(TwoArgmaxes())
        assert [(site.kind, site.top_k) for site in balance_(model).values()] == [("argmax", 2)]

    def test_bf16_and_frozen_routers_are_steered(self):
        model = nn.Sequential(Wild()).bfloat16().requires_grad_(False)
        site = balance_(model)["0"]
        site.bias[1] = 50.0
        model(inputs().bfloat16())
        assert site.counts[1] == TOKENS
