from __future__ import annotations

import pytest
import torch

from moe_plugin.callbacks.step_clock import StepClock, optimizer_of


@pytest.fixture
def parts():
    events: list = []
    clock = StepClock(lambda found_inf: events.append(("step", found_inf)), lambda: events.append(("skip",)))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    clock.start_(optimizer)
    return clock, optimizer, events


class TestStepClock:
    def test_step_inside_a_batch_is_told(self, parts):
        clock, optimizer, events = parts
        clock.batch_starts()
        clock.step_is_due()
        optimizer.step()
        clock.batch_ends()
        assert events == [("step", None)]

    def test_step_outside_of_a_batch_is_not_told(self, parts):
        clock, optimizer, events = parts
        optimizer.step()
        clock.batch_starts()
        clock.batch_ends()
        optimizer.step()
        assert events == []

    def test_step_that_was_due_and_did_not_come_is_skipped(self, parts):
        clock, _, events = parts
        clock.batch_starts()
        clock.step_is_due()
        clock.batch_ends()
        assert events == [("skip",)]

    def test_fused_optimizer_passes_on_the_scalers_verdict(self, parts):
        clock, _, events = parts
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], fused=True)
        clock.start_(optimizer)
        optimizer.found_inf = torch.tensor(1.0)
        clock.batch_starts()
        optimizer.step()
        assert events == [("step", torch.tensor(1.0))]

    def test_after_stop_nothing_is_told(self, parts):
        clock, optimizer, events = parts
        clock.batch_starts()
        clock.stop_()
        clock.batch_starts()
        optimizer.step()
        assert events == []


class TestOptimizerOf:
    def test_optimizer_with_most_of_the_parameters_is_chosen(self):
        first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (first, second)]
        assert optimizer_of(list(second.parameters()), optimizers) is optimizers[1]

    def test_frozen_parameters_take_the_first(self):
        optimizers = [torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1) for _ in range(2)]
        assert optimizer_of([torch.nn.Parameter(torch.zeros(1))], optimizers) is optimizers[0]
