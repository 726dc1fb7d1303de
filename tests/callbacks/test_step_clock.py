from __future__ import annotations

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.core.optimizer import LightningOptimizer

from moe_plugin.callbacks.step_clock import StepClock, optimizer_of
from moe_plugin.errors import AttachError


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
        clock.step_is_due(optimizer)
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
        clock, optimizer, events = parts
        clock.batch_starts()
        clock.step_is_due(optimizer)
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


def optimizer_of_its_own():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


class TestOtherOptimizer:
    @pytest.mark.parametrize("routers_come", ["first", "last"])
    def test_step_of_another_optimizer_is_none(self, parts, routers_come):
        clock, optimizer, events = parts
        other = optimizer_of_its_own()
        for batch in range(4):
            clock.batch_starts()
            due = [optimizer, other] if routers_come == "first" else [other, optimizer]
            for each in due if batch % 2 else [other]:
                clock.step_is_due(each)
                each.step()
            clock.batch_ends()
        assert events == [("step", None)] * 2

    def test_skip_of_another_optimizer_is_none(self, parts):
        clock, optimizer, events = parts
        clock.batch_starts()
        clock.step_is_due(optimizer)
        optimizer.step()
        clock.step_is_due(optimizer_of_its_own())
        clock.batch_ends()
        assert events == [("step", None)]

    def test_step_of_another_does_not_hide_a_skip(self, parts):
        clock, optimizer, events = parts
        clock.batch_starts()
        clock.step_is_due(optimizer)
        other = optimizer_of_its_own()
        clock.step_is_due(other)
        other.step()
        clock.batch_ends()
        assert events == [("skip",)]


class TestWrapper:
    """What a module may return from ``configure_optimizers``; the trainer's hooks name the optimizer inside."""

    def test_lightning_s_is_followed_and_recognised(self, parts):
        clock, optimizer, events = parts
        clock.start_(LightningOptimizer(optimizer))
        for skipped in (False, True):
            clock.batch_starts()
            clock.step_is_due(optimizer)
            if not skipped:
                optimizer.step()
            clock.batch_ends()
        assert events == [("step", None), ("skip",)]

    def test_fabric_s_is_followed(self, parts):
        clock, _, events = parts
        fabric = Fabric(accelerator="cpu", devices=1)
        model = torch.nn.Linear(1, 1)
        _, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        clock.start_(optimizer)
        clock.batch_starts()
        optimizer.step()
        assert events == [("step", None)]

    def test_unhooked_is_an_error_that_names_it(self, parts):
        clock, optimizer, _ = parts

        class Lookahead(torch.optim.Optimizer):
            def __init__(self, optimizer):
                self.optimizer, self.param_groups = optimizer, optimizer.param_groups

        with pytest.raises(AttachError, match="Lookahead does not report its steps"):
            clock.start_(Lookahead(optimizer))


class DeepSpeedOptimizer:
    """The shape of DeepSpeed's: no hooks, one inner step for each parameter group, and a verdict afterwards."""

    def __init__(self, num_groups=2):
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(num_groups)]
        self.optimizer = torch.optim.SGD(groups, lr=0.1)
        self.param_groups = self.optimizer.param_groups
        self.overflow = False

    def step(self, closure=None):
        for _ in self.param_groups if not self.overflow else ():
            self.optimizer.step()


class TestDeepSpeed:
    def test_one_step_is_told_and_an_accumulating_batch_is_not(self, parts):
        clock, _, events = parts
        optimizer = DeepSpeedOptimizer()
        clock.start_(optimizer)
        for batch in range(4):
            clock.batch_starts()
            clock.step_is_due(optimizer)
            if batch % 2:
                optimizer.step()
            clock.batch_ends()
        assert events == [("step", None)] * 2

    def test_overflow_is_a_skip(self, parts):
        clock, _, events = parts
        optimizer = DeepSpeedOptimizer()
        clock.start_(optimizer)
        for optimizer.overflow in (True, False):
            clock.batch_starts()
            optimizer.step()
            clock.batch_ends()
        assert events == [("skip",), ("step", None)]

    def test_stop_leaves_the_optimizer_as_it_was(self, parts):
        clock, _, events = parts
        optimizer = DeepSpeedOptimizer()
        before = dict(vars(optimizer))
        clock.start_(optimizer)
        clock.stop_()
        assert vars(optimizer) == before
        clock.batch_starts()
        optimizer.step()
        assert events == []
