from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from moe_plugin.attach.discovery.findings import routers_to_balance
from moe_plugin.attach.discovery.survey import survey
from moe_plugin.attach.fused import fusible
from moe_plugin.attach.fused.fusible import find_fusible
from moe_plugin.errors import AttachError
from tests.hosts import Host
from tests.stacked_hosts import StackedExperts, StackedHost


class LimitedFromSecondOn(StackedExperts):
    """The limit is an attribute, as with limits by layer in a config."""

    made = 0

    def __init__(self):
        super().__init__()
        self.limit = torch.inf if type(self).made % 2 == 0 else 7.0
        type(self).made += 1

    def gated(self, gate_NH, up_NH):
        return functional.silu(gate_NH.clamp(max=self.limit)) * up_NH


def found(model):
    return find_fusible(model, routers_to_balance(survey(model), model))


@pytest.fixture
def proofs(monkeypatch):
    """The layers that were proven one by one."""
    proven = []

    def counted(experts, projections):
        proven.append(experts)
        return disagreement(experts, projections)

    disagreement = fusible.disagreement
    monkeypatch.setattr(fusible, "disagreement", counted)
    return proven


class TestFindFusible:
    def test_layers_that_differ_in_values_only_are_proven_once(self, proofs):
        model = StackedHost()
        assert list(found(model)) == ["layers.0.experts", "layers.1.experts"]
        assert proofs == [model.layers[0].experts]

    def test_layer_that_differs_in_an_attribute_is_proven_by_itself(self, proofs):
        model = StackedHost(LimitedFromSecondOn)
        with pytest.raises(AttachError, match=r"cannot here: 'layers\.1\.experts': it computes") as error:
            found(model)
        assert "layers.0" not in str(error.value)
        assert proofs == [layer.experts for layer in model.layers]

    def test_layer_that_differs_in_an_attribute_of_a_part_is_proven_by_itself(self, proofs):
        model = StackedHost()
        for slope, layer in enumerate(model.layers):
            layer.experts.activation = torch.nn.LeakyReLU(slope)
        found(model)
        assert proofs == [layer.experts for layer in model.layers]

    def test_every_router_without_stacked_experts_is_counted(self):
        with pytest.raises(AttachError, match=r"'layers.0.router' and 1 more: it has no 3-D parameters"):
            found(Host())
