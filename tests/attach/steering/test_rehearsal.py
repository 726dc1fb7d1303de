"""Routers are proven on random inputs when they are attached, so that compiled code starts proven.

Shape legend: T tokens, D model width.
"""

from __future__ import annotations

import pytest
import torch

from moe_plugin.attach.balance import balance_
from moe_plugin.attach.balanced_model import find_balanced
from moe_plugin.attach.discovery.probing import restored
from moe_plugin.attach.steering import intercept, rehearsal
from moe_plugin.errors import EffectError
from tests.attach.steering.compiled_hosts import D, Model, RanksTwice, Whole


class CountsItsForwards(Whole):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.modes = []

    def forward(self, x_TD):
        self.calls += 1
        self.modes.append(self.training)
        return super().forward(x_TD)


class ChangesATable(Whole):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(1000))

    def forward(self, x_TD):
        with torch.no_grad():
            self.table += 1
        return super().forward(x_TD)


@pytest.fixture
def proven(monkeypatch):
    """Return the names of the routers that ran a proof."""
    names = []

    def prove(trial, plan):
        names.append(trial.site.name)
        return rehearsal_prove(trial, plan)

    rehearsal_prove = rehearsal.prove
    monkeypatch.setattr(rehearsal, "prove", prove)
    return names


def scaled(call, ids):
    return torch.return_types.topk((2 * call.scores.gather(call.dim, ids), ids))


class TestRehearsal:
    def test_routers_built_alike_run_the_proof_once(self, proven):
        balanced = balance_(Model(Whole, depth=3))
        assert proven == ["layers.0"]
        assert all(site.is_rehearsed and not site.is_verified for site in balanced.values())

    def test_verification_switched_off_runs_no_proof(self, proven):
        balance_(Model(Whole), verify=False)
        assert not proven

    def test_router_of_which_too_little_is_known_runs_first(self, proven):
        balanced = balance_(Model(RanksTwice))
        assert not proven
        assert not any(site.is_rehearsed for site in balanced.values())

    def test_router_without_data_is_left_to_its_first_forward(self, proven):
        with torch.device("meta"):
            model = Model(Whole)
        balance_(model)
        assert not proven

    def test_attaching_leaves_state_mode_and_random_numbers(self, proven):
        model = Model(CountsItsForwards).eval()
        before = torch.get_rng_state()
        balance_(model)
        assert proven
        layer = model.layers[0]
        assert torch.equal(torch.get_rng_state(), before)
        assert (layer.calls.item(), layer.modes, layer.training) == (0, [], False)

    def test_change_that_cannot_be_undone_is_an_error_and_nothing_is_attached(self, monkeypatch):
        monkeypatch.setattr(restored, "_MOST_ENTRIES", 999)
        model = Model(ChangesATable)
        with pytest.raises(EffectError, match="changes a large parameter"):
            balance_(model)
        assert find_balanced(model) is None
        assert all(type(layer) is ChangesATable and "_moe_site" not in vars(layer) for layer in model.layers)
        assert [name for name, _ in model.named_buffers()] == []


class TestCompiledFirst:
    @pytest.mark.parametrize("fullgraph", [False, True])
    def test_gate_weights_that_a_bias_changes_are_an_error(self, monkeypatch, fullgraph):
        monkeypatch.setattr(intercept, "_unbiased_result", scaled)
        torch._dynamo.reset()
        model = Model(Whole)
        balance_(model)
        compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
        error = torch._dynamo.exc.Unsupported if fullgraph else EffectError
        with pytest.raises(error, match="run_a_forward_before" if fullgraph else "depends on the bias"):
            compiled(torch.randn(20, D))

    def test_proven_router_is_compiled_at_once(self):
        torch._dynamo.reset()
        model = Model(Whole, depth=1)
        (site,) = balance_(model).values()
        torch.compile(model, backend="eager", fullgraph=True)(torch.randn(20, D))
        assert not site.is_interpreted
