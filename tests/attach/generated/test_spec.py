"""The generator draws what it says, and its reference computes what the plain blocks compute."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch

from tests.attach.generated.block import Model, make_inputs
from tests.attach.generated.checks import CLOSE
from tests.attach.generated.reference import reference
from tests.attach.generated.spec import AXES, RouterSpec, drawn, plainest

DRAWN = [drawn(Random(seed)) for seed in range(3000)]


class TestDrawn:
    @pytest.mark.parametrize("axis", AXES)
    def test_every_value_is_drawn(self, axis):
        assert {getattr(spec, axis) for spec in DRAWN} == set(AXES[axis])

    def test_ordinary_routers_are_drawn(self):
        assert sum(spec.is_ordinary for spec in DRAWN) > len(DRAWN) / 20

    def test_shown_spec_is_code_that_makes_it(self):
        assert [eval(repr(spec), {"RouterSpec": RouterSpec}) for spec in DRAWN[:100]] == DRAWN[:100]


class TestPlainest:
    def test_only_what_makes_it_fail_is_left(self):
        def fails(spec):
            return spec.experts > 5 and spec.look == "item"

        spec = RouterSpec(experts=9, k=1, select="max", look="item", effect="calls", mode="compiled", seed=3)
        assert plainest(spec, fails) == RouterSpec(experts=9, look="item")

    def test_plainer_spec_makes_sense(self):
        spec = RouterSpec(k=1, select="argmax", seed=1)
        assert plainest(spec, lambda each: each.select == "argmax") == replace(spec, seed=0)


class TestReference:
    @pytest.mark.parametrize("spec", [spec for spec in DRAWN[:200] if spec.is_ranked], ids=repr)
    def test_without_a_bias_it_computes_the_plain_block(self, spec):
        model, x = Model(replace(spec, mode="eager")), make_inputs(spec)
        torch.manual_seed(spec.seed)
        found = model(x)
        torch.manual_seed(spec.seed)
        logits = [layer.routing.logits(x.flatten(0, 1)) for layer in model.layers]
        for layer, logits_TE, out in zip(model.layers, logits, found, strict=True):
            for right in reference(layer, x.flatten(0, 1), logits_TE, torch.zeros(layer.spec.experts)):
                if right.margin > CLOSE:  # two experts are not equal
                    close = (
                        {"rtol": 0, "atol": 0.05} if spec.dtype == "bf16" else {"rtol": 1e-4, "atol": 1e-5}
                    )
                    torch.testing.assert_close(out.flatten(0, 1), right.output_TD, **close)
