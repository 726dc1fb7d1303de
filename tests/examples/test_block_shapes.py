"""Blocks in the shapes of well-known code bases are balanced; see `tests.attach.discovery.wild_block`.

Shape legend: B batch, S sequence, D model width, E experts.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_plugin import balance_
from moe_plugin.metrics import max_violation
from tests.attach.discovery.wild_biases import ArgumentLeftOut, BiasAsArgument
from tests.attach.discovery.wild_block import D, E
from tests.attach.discovery.wild_calls import Batched
from tests.attach.discovery.wild_places import LoopOverExperts

BLOCKS = {
    "litgpt": LoopOverExperts,
    "torchtitan": BiasAsArgument,
    "torchtitan without bias": ArgumentLeftOut,
    "lucidrains": Batched,
}


class Model(nn.Module):
    """Two residual blocks on hidden states with a common direction, which makes the load uneven."""

    def __init__(self, block):
        super().__init__()
        torch.manual_seed(0)
        self.direction = nn.Parameter(torch.randn(D))
        self.layers = nn.ModuleList(block() for _ in range(2))

    def forward(self, x_BSD):
        x_BSD = x_BSD + self.direction
        for layer in self.layers:
            x_BSD = x_BSD + layer(x_BSD)
        return x_BSD


def last_violation(model, rule_settings, steps=120):
    """Return MaxVio of the last 20 steps of training together, the worst layer's."""
    balanced = balance_(model, **rule_settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    random = torch.Generator().manual_seed(1)
    total = {name: torch.zeros(E, dtype=torch.int64) for name in balanced}
    for step in range(steps):
        model(torch.randn(8, 32, D, generator=random)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, counts_E in balanced.update().counts.items():
            total[name] += counts_E * (step >= steps - 20)
    return max(max_violation(counts_E).item() for counts_E in total.values())


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
class TestBlocks:
    def test_violation_falls_below_a_quarter_of_the_control(self, block):
        control = last_violation(Model(block), {"rule": None})
        assert control > 0.5
        assert last_violation(Model(block), {}) < control / 4
