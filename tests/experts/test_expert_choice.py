from __future__ import annotations

import pytest
import torch

from moe_plugin.errors import ConfigError
from moe_plugin.experts import ExpertChoiceBlock, GroupedExperts, SwiGLU
from moe_plugin.routing import ExpertChoiceRouter, SoftmaxBeforeTopK

T, D, E, K = 24, 8, 4, 2


def block(shared=None):
    torch.manual_seed(0)
    router = ExpertChoiceRouter(D, E, K, score=SoftmaxBeforeTopK())
    return ExpertChoiceBlock(router, GroupedExperts(E, D, 16), shared)


def slow_block(layer, x_TD):
    """Expert after expert, token after token."""
    scores_TE = (x_TD @ layer.router.weight.T).softmax(-1)
    y_TD = torch.zeros_like(x_TD)
    for expert in range(E):
        for token in scores_TE[:, expert].argsort(descending=True)[: max(1, len(x_TD) * K // E)].tolist():
            gate, up = (x_TD[token] @ layer.experts.gate_up[expert]).chunk(2)
            hidden = torch.nn.functional.silu(gate) * up
            y_TD[token] += scores_TE[token, expert] * (hidden @ layer.experts.down[expert])
    return y_TD


class TestExpertChoice:
    def test_output_and_gradients_equal_slow_reference(self):
        layer, x_TD = block(), torch.randn(T, D)
        torch.testing.assert_close(layer(x_TD), slow_block(layer, x_TD), rtol=1e-4, atol=1e-5)
        actual = torch.autograd.grad(layer(x_TD).square().sum(), list(layer.parameters()))
        expected = torch.autograd.grad(slow_block(layer, x_TD).square().sum(), list(layer.parameters()))
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)

    def test_loads_are_equal(self):
        ids_EC = block().router(torch.randn(T, D)).token_ids_EC
        assert [len(set(ids)) for ids in ids_EC.tolist()] == [T * K // E] * E

    def test_shared_expert_is_added(self):
        shared, x_TD = SwiGLU(D, 16), torch.randn(T, D)
        torch.testing.assert_close(block(shared)(x_TD), block()(x_TD) + shared(x_TD))

    @pytest.mark.parametrize("tokens", [0, 1])
    def test_fewer_tokens_than_experts_are_no_trouble(self, tokens):
        layer, x = block(), torch.randn(1, tokens, D)
        torch.testing.assert_close(layer(x), slow_block(layer, x[0])[None], rtol=1e-4, atol=1e-5)

    def test_later_token_changes_an_earlier_output(self):
        """What makes it a baseline only."""
        layer, x_TD = block(), torch.randn(T, D)
        changed_TD = x_TD.clone()
        changed_TD[-1] = 5 * layer.router.weight[0].detach()
        assert not torch.equal(layer(x_TD)[:-1], layer(changed_TD)[:-1])

    @pytest.mark.parametrize(
        ("top_k", "allowed"),
        [(E + 1, rf"<= num_experts \({E}\), got {E + 1}"), (0, "an integer >= 1, got 0")],
    )
    def test_bad_top_k_is_refused(self, top_k, allowed):
        with pytest.raises(ConfigError, match=f"'top_k' must be {allowed}"):
            ExpertChoiceRouter(D, E, top_k, score=SoftmaxBeforeTopK())
