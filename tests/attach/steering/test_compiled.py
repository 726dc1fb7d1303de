"""Compiled code selects, counts and computes as the uncompiled model does, wherever the compiler breaks off.

Shape legend: T tokens, D model width, E experts.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters

from moe_plugin.attach.balance import balance_
from moe_plugin.attach.balanced_model import find_balanced
from moe_plugin.balancing.rules import Sign
from tests.attach.steering import compiled_hosts as hosts
from tests.attach.steering.compiled_hosts import Apart, D, E, Model, Whole

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),  # of dynamo, in plain models too
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # inductor uses it
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated.*:DeprecationWarning"),
]
UNBROKEN = [hosts.Whole, hosts.UnbrokenRounds, hosts.RanksTwice, hosts.Owns]
BROKEN = [
    hosts.Unique,
    hosts.ToList,
    hosts.Nonzero,
    hosts.BreakBefore,
    hosts.BreakBeforeAndAfter,
    hosts.Rounds,
    hosts.RanksTwiceBroken,
    hosts.OwnsBroken,
]
STEADY = [*UNBROKEN, hosts.Nonzero, hosts.BreakBefore, hosts.Rounds, hosts.RanksTwiceBroken]
"""Plain ones are not compiled again for other ids."""
PARTS = ["", "layers.0", "layers.0.router", "layers.0.router.gate", "layers.0.experts"]
blocks = pytest.mark.parametrize("block", [*UNBROKEN, *BROKEN], ids=lambda block: block.__name__)
ran_before = pytest.mark.parametrize("warm", [False, True], ids=["cold", "ran before"])


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()


def pair(block, depth=1):
    """Return a balanced model and its copy, both with a random bias of the size of the scores' spread."""
    model = Model(block, depth)
    balanced = balance_(model, Sign(rate=0.03))
    for site in balanced.values():
        site.bias.copy_(0.3 * torch.randn(E))
    return model, copy.deepcopy(model)


def balanced_in(model):
    balanced = find_balanced(model)
    assert balanced is not None
    return balanced


def step(model, call, x_TD):
    """Return output, gradients, counts and biases of a step of training or evaluation, and update."""
    balanced, grads = balanced_in(model), torch.is_grad_enabled()
    model.zero_grad()
    x_TD = x_TD.clone().requires_grad_(grads)
    output_TD = call(x_TD)
    if grads:
        output_TD.square().mean().backward()
    counts = [site.counts.clone() for site in balanced.values()]
    counts += [site.eval_counts.clone() for site in balanced.values()]
    if model.training:
        balanced.update()
    of_parameters = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [
        output_TD.detach(),
        *counts,
        x_TD.grad,
        *of_parameters,
        *(site.bias for site in balanced.values()),
    ]


def assert_alike(model, call, plain, num_tokens=20):
    x_TD = torch.randn(num_tokens, D)
    found, right = step(model, call, x_TD), step(plain, plain, x_TD)
    assert len(found) == len(right)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other)


def compile_part(model, name, assigned, **options):
    """Compile a part of the model, in place or assigned back, and return what to call."""
    part = model.get_submodule(name)
    if not assigned:
        part.compile(**options)
    elif not name:
        return torch.compile(model, **options)
    else:
        above, _, last = name.rpartition(".")
        setattr(model.get_submodule(above), last, torch.compile(part, **options))
    return model


class TestReference:
    @blocks
    def test_counts_and_outputs_are_those_of_a_loop_over_tokens(self, block):
        model, _ = pair(block, depth=2)
        balanced, compiled = balanced_in(model), torch.compile(model, backend="eager")
        for _ in range(3):
            x_TD = right_TD = torch.randn(20, D)
            counts = []
            for layer, site in zip(model.layers, balanced.values(), strict=True):
                right_TD, of_layer = hosts.expected(layer, right_TD, site.bias.clone())
                counts.append(of_layer)
            torch.testing.assert_close(compiled(x_TD), right_TD)
            assert [site.counts.tolist() for site in balanced.values()] == counts
            balanced.update()


class TestBreaks:
    @blocks
    def test_compiled_model_trains_as_uncompiled_one(self, block):
        model, plain = pair(block)
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(3):
            assert_alike(model, compiled, plain)

    @pytest.mark.parametrize(
        "block", [hosts.BreakBeforeAndAfter, hosts.RanksTwiceBroken], ids=lambda block: block.__name__
    )
    def test_model_compiled_after_it_ran_trains_as_uncompiled_one(self, block):
        model, plain = pair(block)
        assert_alike(model, model, plain)
        compiled = torch.compile(model, backend="eager")
        for _ in range(3):
            assert_alike(model, compiled, plain)

    @pytest.mark.parametrize("block", UNBROKEN, ids=lambda block: block.__name__)
    @ran_before
    def test_whole_graph_trains_as_uncompiled_model(self, block, warm):
        model, plain = pair(block)
        if block is hosts.RanksTwice and not warm:
            with pytest.raises(Unsupported, match="_run_a_forward_before_compiling_with_fullgraph"):
                torch.compile(model, backend="eager", fullgraph=True)(torch.randn(20, D))
            return
        if warm:
            assert_alike(model, model, plain)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for _ in range(3):
            assert_alike(model, compiled, plain)

    @pytest.mark.slow
    def test_inductor_trains_as_uncompiled_model(self):
        model, plain = pair(hosts.BreakBeforeAndAfter)
        compiled = torch.compile(model, backend="inductor")
        for _ in range(3):
            assert_alike(model, compiled, plain)


class TestParts:
    @pytest.mark.slow
    @pytest.mark.parametrize("part", PARTS)
    @pytest.mark.parametrize(
        ("assigned", "warm", "backend"),
        [(False, False, "aot_eager"), (True, True, "aot_eager"), (True, False, "eager")],
    )
    def test_model_with_a_compiled_part_trains_as_uncompiled_one(self, part, assigned, warm, backend):
        model, plain = pair(Apart, depth=2)
        if warm:
            assert_alike(model, model, plain)
        call = compile_part(model, part, assigned, backend=backend)
        for _ in range(3):
            assert_alike(model, call, plain)

    @pytest.mark.slow
    @pytest.mark.parametrize("part", PARTS)
    @pytest.mark.parametrize("assigned", [False, True], ids=["in place", "assigned"])
    def test_part_compiled_before_balancing_trains_as_uncompiled_one(self, part, assigned):
        model = Model(Apart)
        plain = copy.deepcopy(model)
        call = compile_part(model, part, assigned, backend="aot_eager")
        biases = 0.3 * torch.randn(2, E)
        for each in (model, plain):
            for site, bias_E in zip(balance_(each, Sign(rate=0.03)).values(), biases, strict=True):
                site.bias.copy_(bias_E)
        for _ in range(3):
            assert_alike(model, call, plain)


class TestRecompiling:
    @pytest.mark.parametrize(
        ("block", "dynamic"), [(Whole, None), (hosts.Unique, None), (Whole, True), (hosts.RanksTwice, True)]
    )
    def test_batches_of_other_sizes_train_as_uncompiled(self, block, dynamic):
        model, plain = pair(block)
        compiled = torch.compile(model, backend="aot_eager", dynamic=dynamic)
        for num_tokens in (20, 7, 1, 33):
            assert_alike(model, compiled, plain, num_tokens)

    @pytest.mark.parametrize(
        ("block", "warm"), [(Whole, False), (hosts.Unique, True), (hosts.RanksTwice, False)]
    )
    def test_other_modes_train_and_evaluate_as_uncompiled(self, block, warm):
        model, plain = pair(block)
        if warm:
            assert_alike(model, model, plain)
        compiled = torch.compile(model, backend="aot_eager")
        for training, grads in [(True, True), (False, False), (True, True), (True, False), (False, True)]:
            model.train(training)
            plain.train(training)
            with nullcontext() if grads else torch.no_grad():
                assert_alike(model, compiled, plain)

    @pytest.mark.parametrize("block", STEADY, ids=lambda block: block.__name__)
    def test_bias_that_moves_reaches_the_code_without_compiling_again(self, block):
        model, plain = pair(block)
        compiled = torch.compile(model, backend="aot_eager", dynamic=False)
        for _ in range(2):
            assert_alike(model, compiled, plain)
        graphs = counters["stats"]["unique_graphs"]
        for _ in range(2):
            for one, other in zip(balanced_in(model).values(), balanced_in(plain).values(), strict=True):
                one.bias.copy_(0.3 * torch.randn(E))
                other.bias.copy_(one.bias)
            assert_alike(model, compiled, plain)
        assert counters["stats"]["unique_graphs"] == graphs
