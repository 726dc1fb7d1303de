"""Other ways to run a model than a plain forward: each is right, or refused by an error that names the router.

Shape legend: T tokens, D model width, E experts, K experts selected per token.
"""

from __future__ import annotations

import copy
import io
import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from moe_plugin.attach.balance import balance_
from moe_plugin.balancing.rules import Sign
from moe_plugin.errors import EffectError
from tests.attach.steering import compiled_hosts as hosts
from tests.attach.steering.compiled_hosts import Apart, D, E, K, Model, Router, Whole

ONCE = 20 * K
"""Selections of 20 tokens."""
blocks = pytest.mark.parametrize(
    "block", [Apart, Whole, hosts.Unique, hosts.Owns, hosts.RanksTwice], ids=lambda block: block.__name__
)
ran_before = pytest.mark.parametrize("warm", [False, True], ids=["cold", "ran before"])


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()


def tokens(number=20):
    return torch.randn(number, D)


def balanced_model(block, *, warm=False, training=True):
    """Return a model with a random bias in both routers and its `BalancedModel`."""
    model = Model(block).train(training)
    balanced = balance_(model, Sign(rate=0.03))
    for site in balanced.values():
        site.bias.copy_(0.3 * torch.randn(E))
    if warm:
        model(tokens())
        forget_(balanced)
    return model, balanced


def with_zero_bias(block):
    """Return a balanced model that computes what its plain copy does, and the copy."""
    model = Model(block)
    plain = copy.deepcopy(model)
    return model, plain, balance_(model, Sign(rate=0.03))


def forget_(balanced):
    balanced.discard_counts_()
    for site in balanced.values():
        site.forget_eval_()


def totals(balanced):
    return [int(site.counts.sum()) for site in balanced.values()]


def eval_totals(balanced):
    return [int(site.eval_counts.sum()) for site in balanced.values()]


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")  # counting
class TestExport:
    @pytest.mark.parametrize("block", [Apart, Whole, hosts.Owns], ids=lambda block: block.__name__)
    @pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
    def test_exported_program_computes_what_the_biased_model_does(self, block, strict, training):
        model, balanced = balanced_model(block, training=training)
        x_TD = tokens()
        program = torch.export.export(model, (x_TD,), strict=strict)
        assert totals(balanced) == eval_totals(balanced) == [0, 0], "exporting must not count"
        torch.testing.assert_close(program.module()(x_TD), model(x_TD))

    @pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
    def test_router_that_ranks_twice_is_exported_after_one_forward(self, strict):
        model, _ = balanced_model(hosts.RanksTwice, warm=True, training=False)
        x_TD = tokens()
        program = torch.export.export(model, (x_TD,), strict=strict)
        torch.testing.assert_close(program.module()(x_TD), model(x_TD))

    def test_saved_program_computes_what_the_biased_model_does(self):
        model, _ = balanced_model(Apart, training=False)
        x_TD, file = tokens(), io.BytesIO()
        torch.export.save(torch.export.export(model, (x_TD,)), file)
        file.seek(0)
        torch.testing.assert_close(torch.export.load(file).module()(x_TD), model(x_TD))

    def test_router_that_must_run_first_is_refused_by_name(self):
        model, _ = balanced_model(hosts.RanksTwice)
        with pytest.raises(EffectError, match=r"'layers.0'"):
            torch.export.export(model, (tokens(),), strict=False)

    @pytest.mark.filterwarnings(
        "ignore:Using len to get tensor shape:torch.jit.TracerWarning"
    )  # the host does
    @pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
    def test_torch_jit_trace_is_refused_by_name(self):
        model, balanced = balanced_model(Apart)
        with pytest.raises(EffectError, match=r"'layers.0.router'.*remove\(\)"):
            torch.jit.trace(model, (tokens(),))
        balanced.remove()
        x_TD = tokens()
        traced: Any = torch.jit.trace(model, (x_TD,))
        torch.testing.assert_close(traced(x_TD), model(x_TD))


class TestFunctional:
    @blocks
    @ran_before
    def test_functional_call_computes_the_same_and_counts_once(self, block, warm):
        model, balanced = balanced_model(block, warm=warm)
        expected = copy.deepcopy(model)(x_TD := tokens())
        own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert torch.equal(functional_call(model, own, (x_TD,)), expected)
        assert totals(balanced) == [20 * site.top_k for site in balanced.values()]

    @blocks
    def test_gradients_of_torch_func_are_those_of_backward(self, block):
        model, balanced = balanced_model(block, warm=True)
        plain, x_TD = copy.deepcopy(model), tokens()
        plain(x_TD).square().mean().backward()
        found = grad(lambda own: functional_call(model, own, (x_TD,)).square().mean())(
            dict(model.named_parameters())
        )
        for name, parameter in plain.named_parameters():
            right = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(found[name], right)
        assert len(set(totals(balanced))) == 1
        assert totals(balanced)[0] > 0

    @pytest.mark.filterwarnings(
        "ignore:.*torch.jit.* is deprecated:DeprecationWarning"
    )  # torch itself uses it
    def test_forward_derivative_is_that_of_the_plain_model(self):
        model, balanced = balanced_model(Apart, warm=True)
        plain, x_TD = copy.deepcopy(model), tokens()
        found_TD = jvp(model, (x_TD,), (torch.ones_like(x_TD),))[1]
        step = 1e-3
        right_TD = (plain(x_TD + step) - plain(x_TD - step)) / (2 * step)
        torch.testing.assert_close(found_TD, right_TD, atol=1e-2, rtol=1e-2)
        assert totals(balanced) == [ONCE] * 2

    @ran_before
    def test_vmap_over_inputs_is_refused_by_name(self, warm):
        model, balanced = balanced_model(Apart, warm=warm)
        with pytest.raises(EffectError, match=r"'layers.0.router'.*vmap"):
            vmap(model)(torch.randn(3, 20, D))
        model(tokens())
        assert totals(balanced) == [ONCE] * 2

    @ran_before
    def test_ensemble_by_vmap_is_refused_by_name(self, warm):
        model, _ = balanced_model(Apart, warm=warm)
        stacked = stack_module_state([copy.deepcopy(model) for _ in range(2)])
        with pytest.raises(EffectError, match=r"'layers.0.router'.*vmap"):
            vmap(lambda own, buffers, x: functional_call(model, (own, buffers), (x,)), in_dims=(0, 0, None))(
                *stacked, tokens()
            )


class TestInferenceMode:
    @blocks
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
    def test_training_after_inference_mode_counts_and_moves_the_biases(self, block, training):
        model, balanced = balanced_model(block, training=training)
        with torch.inference_mode():
            model(tokens())
        assert totals(balanced) == [0, 0]
        assert (min(eval_totals(balanced)) > 0) != training
        model.train()
        before = [site.bias.clone() for site in balanced.values()]
        for _ in range(3):
            model(tokens()).square().mean().backward()
            balanced.update()
        assert all(
            not torch.equal(site.bias, old) for site, old in zip(balanced.values(), before, strict=True)
        )


class TestShallowCopies:
    def test_data_parallel_without_gpus_runs_the_model(self):
        model, balanced = balanced_model(Apart)
        expected = copy.deepcopy(model)(x_TD := tokens())
        assert torch.equal(nn.DataParallel(model)(x_TD), expected)
        assert totals(balanced) == [ONCE] * 2

    @pytest.mark.parametrize("part", ["layers.0.router", "layers.1.router"])
    @pytest.mark.parametrize("replicate", [nn.Module._replicate_for_data_parallel, copy.copy])
    def test_shallow_copy_of_a_router_is_refused_by_name(self, part, replicate):
        model, _ = balanced_model(Apart)
        replica = replicate(model.get_submodule(part))
        with pytest.raises(EffectError, match=f"Router '{part}' must run in the model that is balanced"):
            replica(tokens())

    def test_shallow_copy_of_the_model_runs_its_routers(self):
        model, balanced = balanced_model(Apart)
        x_TD = tokens()
        assert torch.equal(copy.copy(model)(x_TD), model(x_TD))
        assert totals(balanced) == [2 * ONCE] * 2


class TestAutocast:
    @blocks
    def test_first_forward_in_bf16_selects_as_the_second_does(self, block):
        model, balanced = balanced_model(block)
        x_TD = tokens()
        with torch.autocast("cpu", torch.bfloat16):
            first_TD = model(x_TD)
            once = [site.counts.clone() for site in balanced.values()]
            assert torch.equal(model(x_TD), first_TD)
        assert all(
            torch.equal(site.counts, 2 * counts_E)
            for site, counts_E in zip(balanced.values(), once, strict=True)
        )


class TestCheckpointing:
    @blocks
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_first_forward_may_be_checkpointed(self, block, reentrant):
        model, balanced = balanced_model(block)
        plain, x_TD = copy.deepcopy(model), tokens()
        inputs = [x_TD.clone().requires_grad_() for _ in range(2)]
        y_TD = inputs[0]
        for layer in model.layers:
            y_TD = checkpoint(layer, y_TD, use_reentrant=reentrant)
        y_TD.square().mean().backward()
        plain(inputs[1]).square().mean().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            if other.grad is not None:
                torch.testing.assert_close(one.grad, other.grad)
        assert totals(balanced)[0] == totals(balanced)[1]
        assert totals(balanced)[0] in (20, ONCE)


class TestFirstForward:
    @blocks
    def test_it_may_have_no_tokens_or_one(self, block):
        model, balanced = balanced_model(block)
        k = next(iter(balanced.values())).top_k
        for number, total in [(0, 0), (1, k), (50, 51 * k)]:
            assert model(tokens(number)).shape == (number, D)
            assert totals(balanced) == [total] * 2
        assert all(site.is_verified for site in balanced.values())

    def test_router_may_get_keyword_arguments_only(self):
        model, balanced = balanced_model(ByKeyword)
        expected = copy.deepcopy(model)(x_TD := tokens())
        assert torch.equal(model(x_TD), expected)
        assert totals(balanced) == [ONCE] * 2

    def test_input_that_the_host_changes_is_changed_once(self):
        model, plain, balanced = with_zero_bias(InPlace)
        one_TD = tokens()
        other_TD = one_TD.clone()
        assert torch.equal(model(one_TD), plain(other_TD))
        assert torch.equal(one_TD, other_TD)
        assert totals(balanced) == [ONCE] * 2

    @pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
    def test_same_random_numbers_are_drawn_as_without_balancing(self, training):
        model, plain, _ = with_zero_bias(Noisy)
        drawn = []
        for each in (model.train(training), plain.train(training)):
            torch.manual_seed(3)
            random.seed(3)
            drawn.append([each(tokens()), each(tokens()), torch.rand(1), torch.tensor(random.random())])
        assert all(torch.equal(one, other) for one, other in zip(*drawn, strict=True))

    @pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
    def test_cache_that_the_host_is_given_grows_once_per_forward(self, training):
        model = Caching().train(training)
        plain = copy.deepcopy(model)
        balance_(model)
        caches = [Cache(), Cache()]
        for number in range(3):
            x_TD = tokens()
            assert torch.equal(model(x_TD, caches[0]), plain(x_TD, caches[1]))
            assert [len(cache.kept) for cache in caches] == [number + 1] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
class TestCudaGraphs:
    def test_captured_step_selects_and_counts_as_plain_ones(self):
        model = Model(Apart).cuda()
        balanced = balance_(model, Sign(rate=0.03))
        x_TD = tokens().cuda()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(x_TD)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y_TD = model(x_TD)
        for site in balanced.values():
            site.bias.copy_(0.3 * torch.randn(E))
        forget_(balanced)
        plain = copy.deepcopy(model)
        for _ in range(2):
            x_TD.copy_(tokens())
            graph.replay()
            torch.testing.assert_close(y_TD, plain(x_TD))
        assert totals(balanced) == [2 * ONCE] * 2


class KeywordRouter(Router):
    def forward(self, *, x_TD):
        return super().forward(x_TD)


class ByKeyword(Apart):
    def __init__(self):
        super().__init__()
        self.router = KeywordRouter()

    def forward(self, x_TD):
        return x_TD + self.experts(x_TD, *self.router(x_TD=x_TD))


class InPlace(Whole):
    def forward(self, x):
        return super().forward(x.mul_(1.5))


class Noisy(Whole):
    """Draws random numbers of torch and of Python."""

    def scores(self, x_TD):
        return super().scores(x_TD + 0.1 * torch.rand_like(x_TD) + 0.01 * random.random())


class Cache:
    """Grows in each forward, as a cache of keys and values."""

    def __init__(self):
        self.kept = []

    def update(self, x_TD):
        self.kept.append(x_TD)
        return torch.cat(self.kept)


class CachingBlock(Whole):
    """Extends the cache that it is given, and uses all that is in it."""

    def forward(self, x, cache=None):
        return super().forward(x if cache is None else x + cache.update(x).mean(0))


class Caching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([CachingBlock()])

    def forward(self, x, cache=None):
        for layer in self.layers:
            x = layer(x, cache)
        return x
