from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_plugin.balancing import tally as tally_module
from moe_plugin.balancing.counts import EXTRA_SLOTS
from moe_plugin.balancing.tally import Tally, settle_

NUM_EXPERTS = 5


def slow_slots(calls):
    slots = [0] * (NUM_EXPERTS + EXTRA_SLOTS)
    for ids_TK, selected_TK in calls:
        for expert, score in zip(ids_TK.flatten().tolist(), selected_TK.flatten().tolist(), strict=True):
            slots[expert if abs(score) < float("inf") else NUM_EXPERTS] += 1
    return slots


@st.composite
def a_call(draw, num_tokens=None):
    num_tokens = draw(st.integers(0, 9)) if num_tokens is None else num_tokens
    ids = draw(st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=2 * num_tokens, max_size=2 * num_tokens))
    score = st.sampled_from([0.0, -3.5, 1e38, float("nan"), float("inf"), -float("inf")])
    scores = draw(st.lists(score, min_size=2 * num_tokens, max_size=2 * num_tokens))
    return torch.tensor(ids, dtype=torch.int64).view(-1, 2), torch.tensor(scores).view(-1, 2)


class TestKeep:
    @settings(max_examples=100, deadline=None)
    @given(st.lists(a_call(), max_size=5), st.integers(1, 20), st.integers(1, 4))
    def test_any_calls_equal_slow_loop_however_often_they_are_counted(self, calls, selections, most_calls):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tally_module, "MOST_SELECTIONS", selections)
            patch.setattr(tally_module, "MOST_CALLS", most_calls)
            tally = Tally(NUM_EXPERTS)
            for ids_TK, selected_TK in calls:
                tally.keep_(ids_TK, selected_TK, training=True)
                assert tally.num_kept <= selections
        assert tally.settled().tolist() == slow_slots(calls)
        assert tally.settled().tolist() == slow_slots(calls), "nothing counts twice"

    def test_evaluation_does_not_look_at_scores(self):
        tally = Tally(NUM_EXPERTS)
        with torch.inference_mode():
            tally.keep_(torch.tensor([[1, 2]]), torch.tensor([[torch.nan, 1.0]]), training=False)
        assert tally.settled()[: NUM_EXPERTS + 1].tolist() == [0, 1, 1, 0, 0, 0]

    def test_no_grad_in_training_keeps_nothing(self):
        tally = Tally(NUM_EXPERTS)
        with torch.no_grad():
            tally.keep_(torch.tensor([[1, 2]]), torch.ones(1, 2), training=True)
        assert tally.num_kept == 0
        assert not tally.settled().any()

    def test_ids_written_into_later_count_as_they_were_selected(self):
        tally, ids_TK = Tally(NUM_EXPERTS), torch.tensor([[1, 2]])
        tally.keep_(ids_TK, torch.ones(1, 2), training=True)
        ids_TK.fill_(-1)
        assert tally.settled()[:NUM_EXPERTS].tolist() == [0, 1, 1, 0, 0]

    def test_scores_written_into_later_are_not_looked_at(self):
        tally, selected_TK = Tally(NUM_EXPERTS), torch.ones(1, 2)
        tally.keep_(torch.tensor([[1, 2]]), selected_TK, training=True)
        selected_TK[0, 0] = -torch.inf
        assert tally.settled()[: NUM_EXPERTS + 1].tolist() == [0, 1, 1, 0, 0, 0]

    def test_scores_with_gradients_keep_no_graph_alive(self):
        tally, scores_TE = Tally(NUM_EXPERTS), torch.ones(1, 2, requires_grad=True)
        tally.keep_(torch.tensor([[1, 2]]), scores_TE * 2, training=True)
        assert all(selected.grad_fn is None for selected in tally.kept_selected())

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
    def test_copies_hold_what_is_kept(self, copied):
        tally = Tally(NUM_EXPERTS)
        tally.keep_(torch.tensor([[1, 2]]), torch.ones(1, 2, requires_grad=True) * 2, training=True)
        assert copied(tally).settled().tolist() == tally.settled().tolist()

    def test_reset_forgets_what_is_kept(self):
        tally = Tally(NUM_EXPERTS)
        tally.keep_(torch.tensor([[1, 2]]), torch.ones(1, 2), training=True)
        tally.reset_()
        assert not tally.settled().any()

    def test_another_device_keeps_counts(self):
        tally = Tally(NUM_EXPERTS)
        tally.keep_(torch.tensor([[1, 2]]), torch.ones(1, 2), training=True)
        tally.to_(torch.device("cpu"))
        assert tally.slots_S[:NUM_EXPERTS].tolist() == [0, 1, 1, 0, 0]


class TestSettle:
    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.lists(a_call(), max_size=3), min_size=1, max_size=4))
    def test_several_sites_equal_each_alone(self, calls_of_sites):
        tallies = [Tally(NUM_EXPERTS) for _ in calls_of_sites]
        for tally, calls in zip(tallies, calls_of_sites, strict=True):
            for ids_TK, selected_TK in calls:
                tally.keep_(ids_TK, selected_TK, training=True)
        settle_(tallies)
        assert [tally.slots_S.tolist() for tally in tallies] == [
            slow_slots(calls) for calls in calls_of_sites
        ]
