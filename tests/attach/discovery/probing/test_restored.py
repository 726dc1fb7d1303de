"""One more forward on real tensors leaves nothing behind."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from moe_plugin.attach.discovery.probing.restored import Snapshot
from tests.attach.discovery.probing import filing_routers as routers
from tests.attach.discovery.wild_block import D

T = 20


class Changing(nn.Module):
    """Changes each thing that a forward may change."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(D)
        self.router = routers.InManager()
        self.total = torch.zeros(D)
        self.dropout = nn.Dropout()

    def forward(self, x):
        self.total += x.sum(0)
        self.calls = getattr(self, "calls", 0) + 1
        noise = random.random() + np.random.rand()
        return self.dropout(self.router(self.norm(x))) + noise


class TestRestored:
    def test_buffers_and_plain_tensors_have_their_values(self):
        model = Changing()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with Snapshot(model).restoring():
            model(torch.randn(T, D))
            assert not torch.equal(model.norm.running_mean, before["norm.running_mean"])
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert model.total.abs().sum() == 0
        assert not hasattr(model, "calls")

    def test_next_forward_draws_the_same_numbers(self):
        model, x = Changing().eval(), torch.randn(T, D)
        model.dropout.train()
        with Snapshot(model).restoring():
            first = model(x)
        assert torch.equal(model(x), first)

    def test_filed_losses_are_gone(self):
        model, before = Changing(), len(routers.InManager.filed())
        with Snapshot(model).restoring():
            model(torch.randn(T, D))
            assert len(routers.InManager.filed()) == before + 1
        assert len(routers.InManager.filed()) == before

    def test_forward_that_fails_is_undone_too(self):
        model = Changing()

        def fail():
            with Snapshot(model).restoring():
                model.total += 1
                model(torch.randn(T, D + 1))

        with pytest.raises(RuntimeError):
            fail()
        assert model.total.abs().sum() == 0

    def test_graph_made_before_stays_valid(self):
        model = Changing()
        weight = torch.ones(D, requires_grad=True)
        loss = (weight * model.total).sum()
        with Snapshot(model).restoring():
            model.total = torch.ones(D)
        loss.backward()
        assert weight.grad.abs().sum() == 0
