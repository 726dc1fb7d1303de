"""Choices are forced wherever a router makes them, so gates that come from another choice are seen.

Shape legend: T tokens, E experts, K experts selected per token.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moe_plugin.attach.discovery.probing.ranking_calls import Use
from moe_plugin.attach.discovery.routing_style import RoutingStyle
from moe_plugin.attach.verification.forced_selection import ForcedSelection
from moe_plugin.attach.verification.observation import Seen

T, E = 6, 5
LOGITS_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(0))
P_TE = LOGITS_TE.softmax(-1)
SECOND_TK = LOGITS_TE.argsort(-1, descending=True)[:, 1:]


def forced(route, k, style=None, ids_TK=None):
    """Return what a routing gives that is forced to the second best experts instead of the best."""
    site = SimpleNamespace(style=style or RoutingStyle(E, k), host_owns_bias=False)
    ids_TK = SECOND_TK[:, :k] if ids_TK is None else ids_TK
    plain = Seen(LOGITS_TE, LOGITS_TE.topk(k).indices, torch.ones(T, k, dtype=torch.bool))
    mode = ForcedSelection(site, plain, ids_TK)
    with mode:
        result = route()
    assert mode.has_forced
    return result


class TestChoices:
    @pytest.mark.parametrize("k", [1, 2])
    def test_topk_gives_forced_experts_and_their_values(self, k):
        values_TK, ids_TK = forced(lambda: P_TE.topk(k), k)
        assert torch.equal(ids_TK, SECOND_TK[:, :k])
        assert torch.equal(values_TK, P_TE.gather(1, ids_TK))

    @pytest.mark.parametrize(
        "gate",
        [
            lambda: P_TE.max(-1).values,
            lambda: P_TE.amax(-1),
            lambda: torch.amax(P_TE, dim=(1,)),
            lambda: P_TE.topk(1)[0][:, 0],
        ],
    )
    def test_gates_of_a_second_choice_are_those_of_the_forced_expert(self, gate):
        ids_T, weights_T = forced(lambda: (LOGITS_TE.argmax(-1), gate()), 1)
        assert torch.equal(ids_T, SECOND_TK[:, 0])
        assert torch.equal(weights_T, P_TE.gather(1, SECOND_TK[:, :1])[:, 0])

    def test_argmin_of_the_negative_is_the_choice_too(self):
        assert torch.equal(forced(lambda: (-LOGITS_TE).argmin(-1, keepdim=True), 1), SECOND_TK[:, :1])

    def test_sort_has_the_forced_experts_first_and_the_rest_behind(self):
        _, ids_TE = forced(lambda: P_TE.sort(-1, descending=True), 2)
        assert torch.equal(ids_TE[:, :2], SECOND_TK[:, :2])
        assert torch.equal(ids_TE.sort(-1).values, torch.arange(E).expand(T, E))

    def test_ascending_sort_has_them_at_the_end_if_the_router_takes_them_there(self):
        style = RoutingStyle(E, 2, kind="sort", use=Use(cut=True, from_end=True))
        assert torch.equal(forced(lambda: P_TE.argsort(-1), 2, style)[:, -2:], SECOND_TK[:, :2])

    def test_rounds_are_forced_one_after_the_other(self):
        def rounds():
            first_T = LOGITS_TE.argmax(-1, keepdim=True)
            return torch.cat([first_T, LOGITS_TE.scatter(1, first_T, -torch.inf).argmax(-1, keepdim=True)], 1)

        style = RoutingStyle(E, 2, kind="argmax", use=Use(k=1, rounds=2))
        assert torch.equal(forced(rounds, 2, style), SECOND_TK[:, :2])

    def test_halves_of_the_tokens_get_their_own_experts(self):
        halves = forced(lambda: torch.cat([half.topk(2).indices for half in LOGITS_TE.chunk(2)]), 2)
        assert torch.equal(halves, SECOND_TK[:, :2])


class TestOtherCalls:
    def test_ranking_of_other_scores_is_left_alone(self):
        other_TE = LOGITS_TE.roll(1, 0)
        ids_TK, others_TK = forced(lambda: (LOGITS_TE.topk(2).indices, other_TE.topk(2).indices), 2)
        assert torch.equal(ids_TK, SECOND_TK[:, :2])
        assert torch.equal(others_TK, LOGITS_TE.topk(2).indices.roll(1, 0))

    def test_largest_score_of_several_choices_is_left_alone(self):
        _, largest_T = forced(lambda: (LOGITS_TE.topk(2), LOGITS_TE.max(-1).values), 2)
        assert torch.equal(largest_T, LOGITS_TE.amax(-1))
