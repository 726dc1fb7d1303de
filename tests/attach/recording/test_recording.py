"""Scores and routes on request equal what a router of plain code does.

Shape legend: B sequences, S positions, L MoE layers, T tokens, D width, K experts selected per token, E experts.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_plugin import balance_
from moe_plugin.attach.recording.routes import Routes
from moe_plugin.errors import EffectError
from moe_plugin.experts import GroupedExperts, MoEBlock
from moe_plugin.routing import DynamicRouter, Sigmoid, Threshold
from tests.hosts import GroupedRouter, Host, OwningRouter, SoftmaxRouter

ROUTERS = ["layers.0.router", "layers.1.router"]
TOKENS_BS = torch.randint(0, 32, (3, 5), generator=torch.Generator().manual_seed(2))


def balanced_host(router=SoftmaxRouter):
    torch.manual_seed(0)
    model = Host(router)
    balanced = balance_(model)
    for site in balanced.values():
        site.bias.copy_(torch.tensor([0.3, -0.2, 0.1, -0.2]))
    model(TOKENS_BS)  # what the first forward tries is not recorded
    return model, balanced


def inputs_of_routers(model, tokens_BS):
    """The input (T, D) of each router, by hooks."""
    inputs, handles = {}, []
    for name in ROUTERS:
        router = model.get_submodule(name)
        handles.append(
            router.register_forward_pre_hook(
                lambda _, args, name=name: inputs.__setitem__(name, args[0].detach())
            )
        )
    model(tokens_BS)
    for handle in handles:
        handle.remove()
    return inputs


def plain(router, x_TD):
    """Scores of each token in Python, without balancing: closed groups are -inf."""
    scores_TE = (x_TD @ router.weight.T).double()
    if isinstance(router, OwningRouter):
        return scores_TE.sigmoid()
    scores_TE = scores_TE.softmax(-1)
    if isinstance(router, GroupedRouter):
        for scores_E in scores_TE:
            best = int(scores_E.argmax()) // 2
            scores_E[[e for e in range(4) if e // 2 != best]] = -torch.inf
    return scores_TE


class TestRouterScores:
    @pytest.mark.parametrize("router", [SoftmaxRouter, OwningRouter, GroupedRouter])
    @torch.no_grad()
    def test_they_are_those_of_plain_code_and_choices_the_best_with_the_bias(self, router):
        model, balanced = balanced_host(router)
        inputs = inputs_of_routers(model, TOKENS_BS)
        with balanced.router_scores() as routers:
            model(TOKENS_BS[:1])
            model(TOKENS_BS)
        assert list(routers) == ROUTERS
        for name, (scores_TE, ids_TK, used_TK) in routers.items():
            expected_TE = plain(model.get_submodule(name), inputs[name])
            torch.testing.assert_close(scores_TE.double(), expected_TE, atol=1e-6, rtol=1e-5)
            biased_TE = expected_TE + balanced[name].bias
            for biased_E, ids_K in zip(biased_TE.tolist(), ids_TK.tolist(), strict=True):
                best = sorted(range(4), key=lambda e, row=biased_E: -row[e])[: len(ids_K)]
                assert sorted(ids_K) == sorted(best)
            assert used_TK is None

    def test_nothing_is_kept_after_the_block_and_counts_go_on(self):
        model, balanced = balanced_host()
        balanced.discard_counts_()
        with balanced.router_scores():
            model(TOKENS_BS)
        assert [site.counts.sum().item() for site in balanced.values()] == [15 * 2] * 2
        assert all(site.witnesses == {} for site in balanced.values())

    def test_experts_that_a_token_does_not_use_are_marked(self):
        torch.manual_seed(0)
        router = DynamicRouter(8, 4, 1, score=Sigmoid(), cut=Threshold(), max_k=3)
        block = nn.Sequential(MoEBlock(router, GroupedExperts(4, 8, 8)))
        balanced, x_TD = balance_(block), torch.randn(20, 8)
        (name,) = balanced
        balanced[name].level.sub_(0.5)
        block(x_TD)
        with balanced.router_scores() as scores, balanced.recorded_routes(batch_size=4) as routes:
            block(x_TD)
        routing = block[0].router(x_TD)
        assert torch.equal(scores[name].used_TK, routing.used_TK)
        expected = routing.expert_ids_TK.masked_fill(~routing.used_TK, -1)
        assert torch.equal(routes[name].long(), expected.view(4, 5, -1))
        assert (routes[name] == -1).any()


class TestRecordedRoutes:
    @torch.no_grad()
    def test_each_token_of_each_sequence_has_the_experts_it_gets_alone(self):
        model, balanced = balanced_host()
        with balanced.recorded_routes(batch_size=3) as routes:
            model(TOKENS_BS[:, :4])  # a prompt
            model(TOKENS_BS[:, 4:])  # what is generated after it
        assert list(routes) == ROUTERS
        assert routes.stacked().shape == (3, 5, 2, 2)
        for sequence in range(3):
            for position in range(5):
                inputs = inputs_of_routers(model, TOKENS_BS[sequence, position].view(1, 1))
                for layer, name in enumerate(ROUTERS):
                    biased_E = plain(model.get_submodule(name), inputs[name])[0] + balanced[name].bias
                    chosen = routes.stacked()[sequence, position, layer].tolist()
                    assert sorted(chosen) == sorted(biased_E.topk(2).indices.tolist())

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_recomputed_forward_is_recorded_once(self, reentrant):
        model, balanced = balanced_host()
        with balanced.recorded_routes(batch_size=3) as routes:
            x = model.embedding(TOKENS_BS)
            for layer in model.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            x.sum().backward()
        assert routes.stacked().shape == (3, 5, 2, 2)

    @torch.no_grad()
    @pytest.mark.parametrize("in_place", [True, False])
    def test_compiled_model_is_recorded(self, in_place):
        model, balanced = balanced_host()
        with balanced.recorded_routes(batch_size=3) as expected:
            model(TOKENS_BS)
        compiled = model if in_place else torch.compile(model, backend="eager")
        if in_place:
            model.compile(backend="eager", fullgraph=True)
        compiled(TOKENS_BS)
        with balanced.recorded_routes(batch_size=3) as routes, balanced.router_scores() as scores:
            compiled(TOKENS_BS)
        assert torch.equal(routes.stacked(), expected.stacked())
        assert list(scores) == ROUTERS
        compiled(TOKENS_BS)

    def test_tokens_that_are_no_whole_positions_are_refused(self):
        model, balanced = balanced_host()
        with (
            pytest.raises(EffectError, match=r"'layers.0.router' saw 15 tokens.* of 4 sequences"),
            balanced.recorded_routes(batch_size=4),
        ):
            model(TOKENS_BS)
        assert all(site.witnesses == {} for site in balanced.values())

    def test_routers_that_saw_other_positions_are_refused(self):
        model, balanced = balanced_host()
        found = r"'layers.0.router': 5, 'layers.1.router': 10"
        with pytest.raises(EffectError, match=found), balanced.recorded_routes(batch_size=3):
            model.layers[1](model.layers[1](model.layers[0](model.embedding(TOKENS_BS))))

    def test_block_without_a_forward_is_an_error(self):
        _, balanced = balanced_host()
        with pytest.raises(EffectError, match="No router ran"), balanced.recorded_routes(batch_size=3):
            pass
        assert len(Routes(batch_size=3)) == 0
