from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from moe_plugin import balance_
from moe_plugin.attach.site_group import site_groups
from moe_plugin.balancing.rules import (
    PID,
    Adaptive,
    Load,
    Momentum,
    Multiplicative,
    PrimalDual,
    Proportional,
    Quantile,
    Sign,
)
from moe_plugin.errors import ConfigError
from tests.hosts import Host, OwningRouter, SoftmaxRouter

RULES = [
    Proportional(),
    Proportional(rate=0.1, limit=0.5),
    Sign(rate=0.1),
    Sign(),
    Momentum(),
    Multiplicative(rate=0.1),
    PID(rate=0.1),
    PrimalDual(rate=0.1),
    Adaptive(rate=0.1),
    Quantile(),
]


def groups_of(balanced):
    return site_groups(list(balanced.values()), balanced._rules, balanced._memories)


def trained(rule, *, together):
    """Biases and memories after steps, with all sites in one group or each in its own."""
    torch.manual_seed(0)
    model = Host(SoftmaxRouter, num_experts=8)
    balanced = balance_(model, rule)
    if not together:  # rules that are equal but not the same part the sites
        balanced._rules["layers.0.router"] = type(rule)(**vars(rule))
    assert len(groups_of(balanced)) == (1 if together else 2)
    for step in range(4):
        torch.manual_seed(step)
        model(torch.randint(0, 32, (4, 9))).square().mean().backward()
        balanced.update()
    record = balanced.record
    return (
        balanced.state_dict(),
        {name: count.tolist() for name, count in record.counts.items()},
        list(record.tokens),
    )


class TestTogether:
    @pytest.mark.parametrize("rule", RULES, ids=repr)
    def test_biases_and_memories_equal_those_of_sites_alone(self, rule):
        one, alone = trained(rule, together=True), trained(rule, together=False)
        assert one[1:] == alone[1:]
        for name, site in one[0]["sites"].items():
            torch.testing.assert_close(site["bias"], alone[0]["sites"][name]["bias"], atol=1e-7, rtol=1e-6)
            assert site["state"].keys() == alone[0]["sites"][name]["state"].keys()
            for key, value in site["state"].items():
                torch.testing.assert_close(value, alone[0]["sites"][name]["state"][key])

    def test_saved_memories_share_no_storage(self):
        states = [site["state"] for site in trained(Momentum(), together=True)[0]["sites"].values()]
        assert len({state["momentum"].untyped_storage().data_ptr() for state in states}) == len(states)

    def test_site_without_tokens_is_left_alone(self):
        model = Host(OwningRouter)
        balanced = balance_(model, Sign(rate=0.1))
        for _ in range(2):
            model(torch.randint(0, 32, (4, 9))).square().mean().backward()
            before = balanced["layers.1.router"].bias.clone()
            if balanced.step:
                balanced["layers.1.router"].counters.discard_()
            balanced.update()
        assert torch.equal(balanced["layers.1.router"].bias, before)
        assert balanced.record.tokens["layers.1.router"] == 0
        assert balanced.record.tokens["layers.0.router"] == 36


@dataclass(frozen=True)
class MixesLayers:
    """A rule as a user might write it, who thinks of one site."""

    rate: float = 0.1

    def step(self, load: Load, rate, memory):
        counts_E = load.counts_E.double()
        return rate * (counts_E.mean() - counts_E)


class TestCheckRule:
    def test_rule_of_the_documentation_moves_the_fullest_experts(self):
        text = Path("docs/rules.md").read_text()
        code = text.split("### Your own rule")[1].split("```python\n")[1].split("```")[0]
        names = {"model": Host()}
        exec(compile(code, "docs/rules.md", "exec"), names)
        names["model"](torch.randint(0, 32, (4, 9))).square().mean().backward()
        for name, counts_E in names["balanced"].update().counts.items():
            assert torch.equal(names["balanced"][name].bias < 0, counts_E == counts_E.max())

    def test_rule_that_mixes_sites_is_an_error_before_a_bias_moves(self):
        model = Host()
        balanced = balance_(model, MixesLayers())
        model(torch.randint(0, 32, (4, 9))).square().mean().backward()
        before = [site.bias.clone() for site in balanced.values()]
        with pytest.raises(ConfigError, match=r"MixesLayers.*over the last dimension only"):
            balanced.update()
        assert all(torch.equal(site.bias, bias) for site, bias in zip(balanced.values(), before, strict=True))
