"""The blocks of other packages, if they are installed, are balanced without a change to them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from moe_plugin.attach.balance import balance_
from moe_plugin.balancing.rules import Sign
from tests.attach.discovery.real_blocks import REAL, D, E, K
from tests.attach.discovery.wild_block import after_sign

TOKENS = 24

pytestmark = [
    pytest.mark.parametrize("real", REAL.values(), ids=REAL),
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),  # of torchtitan's autocast, and of einops
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]


@pytest.fixture
def model(real):
    torch.manual_seed(0)
    return nn.Sequential(real.build(), real.build())


@pytest.fixture
def x_BSD():
    return torch.randn(2, TOKENS // 2, D, generator=torch.Generator().manual_seed(1))


def step(model, x_BSD):
    torch.manual_seed(0)
    output = model(x_BSD)
    output.square().mean().backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class TestRealBlocks:
    def test_zero_bias_changes_no_bit_and_counts_are_exact(self, real, model, x_BSD):
        plain, keys = copy.deepcopy(model), list(model.state_dict())
        balanced = balance_(model)
        (output, gradients), (theirs, their_gradients) = step(model, x_BSD), step(plain, x_BSD)
        assert torch.equal(output, theirs)
        assert gradients.keys() == their_gradients.keys()
        assert all(torch.equal(gradient, their_gradients[name]) for name, gradient in gradients.items())
        assert list(balanced) == [f"{block}.{real.router}".rstrip(".") for block in (0, 1)]
        assert [site.counts.sum() for site in balanced.values()] == [TOKENS * K] * 2
        assert list(model.state_dict()) == keys

    def test_gate_weights_follow_from_unbiased_scores(self, real, model, x_BSD):
        balanced, checked = balance_(model, rule=None), {}
        for name, site in balanced.items():
            site.bias.copy_(torch.randn(E) / 3)
            site.bias[3] += 50.0
            site.router.register_forward_hook(
                lambda router, args, output, name=name, site=site: checked.update(
                    {name: (real.gates(output), real.expected(router, args[0], site.bias))}
                )
            )
        step(model, x_BSD)
        assert list(checked) == list(balanced)
        for ours, expected in checked.values():
            torch.testing.assert_close(ours.view_as(expected), expected)
        assert [site.counts[3] for site in balanced.values()] == [TOKENS] * 2

    def test_updates_move_every_bias_and_remove_restores(self, real, model, x_BSD):
        plain = copy.deepcopy(model)
        untouched = {name: (type(part), set(vars(part))) for name, part in model.named_modules()}
        balanced = balance_(model, Sign(rate=0.1))
        step(model, x_BSD)
        expected = {name: after_sign(site.bias, site.counts, 0.1) for name, site in balanced.items()}
        balanced.update()
        torch.testing.assert_close({name: site.bias for name, site in balanced.items()}, expected)
        for site in balanced.values():
            site.bias.zero_()
        balanced.remove()
        assert {name: (type(part), set(vars(part))) for name, part in model.named_modules()} == untouched
        assert torch.equal(step(model, x_BSD)[0], step(plain, x_BSD)[0])
