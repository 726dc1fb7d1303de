"""Blocks of the shapes of public repositories are right under a bias, or refused with an error that names them."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_plugin.attach.balance import balance_
from moe_plugin.attach.balanced_model import find_balanced
from moe_plugin.balancing.rules import Sign
from moe_plugin.errors import AttachError, EffectError
from tests.attach.discovery.wild_block import after_sign
from tests.strangers.blocks import BALANCED, BLOCKS, REFUSED
from tests.strangers.host import Model, attributes, clear_, first, kept_outside, same, step
from tests.strangers.stranger import E, T

balanced_ones = pytest.mark.parametrize("stranger", BALANCED.values(), ids=BALANCED)
sizes = pytest.mark.parametrize("size", [0.3, 50.0])
pytestmark = pytest.mark.filterwarnings("ignore")  # of the hosts' code, and of torch.compile about it


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    for stranger in BLOCKS.values():
        clear_(stranger.shared)


@pytest.fixture
def model(stranger):
    return Model(stranger)


@pytest.fixture
def x(stranger, model):
    return stranger.inputs()


def biased_(balanced, size):
    """Draw a small bias for each router, or a large one for one expert, and return them."""
    biases = [torch.randn(E) * size if size < 1 else torch.eye(E)[1] * size for _ in balanced]
    for site, bias_E in zip(balanced.values(), biases, strict=True):
        site.bias.copy_(bias_E)
    return biases


@contextmanager
def right_or_refused(stranger, model):
    """End the test if the block may be refused, and is, with an error that names it."""
    try:
        yield
    except (AttachError, EffectError) as error:
        named = type(model.layers[0]).__name__ in str(error) or f"layers.0.{stranger.router}" in str(error)
        if stranger.may_refuse and named:
            pytest.skip(f"refused: {error}")
        raise


def attached(stranger, model, **settings):
    with right_or_refused(stranger, model):
        return balance_(model, **settings)


def run(stranger, model, x, seed, layer=None):
    """Return the output of the model's first layer, or of a compiled one."""
    torch.manual_seed(seed)
    with right_or_refused(stranger, model):
        return first((model.layers[0] if layer is None else layer)(x))


def take_step(stranger, model, x):
    with right_or_refused(stranger, model):
        return step(model, stranger, x)


def bias_of(stranger, layer):
    """Return the block's own bias, or none."""
    if stranger.bias_name is None:
        return torch.zeros(E)
    return getattr(layer.get_submodule(stranger.router), stranger.bias_name)


class TestStrangers:
    @balanced_ones
    def test_reference_computes_the_plain_block(self, stranger, model, x):
        layer = model.layers[0]
        for seed in (1, 2):
            torch.manual_seed(seed)
            output = first(layer(x))
            torch.manual_seed(seed)
            with torch.no_grad():
                _, expected = stranger.reference(layer, x, bias_of(stranger, layer))
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)

    @balanced_ones
    def test_router_is_found_with_its_numbers_and_its_bias(self, stranger, model):
        balanced = attached(stranger, model)
        names = [f"layers.{i}.{stranger.router}".rstrip(".") for i in range(2)]
        assert list(balanced) == names
        assert [(s.num_experts, s.top_k) for s in balanced.values()] == [(E, stranger.top_k)] * 2
        owned = [s.bias_place.name if s.host_owns_bias else None for s in balanced.values()]
        assert owned == [stranger.bias_name] * 2

    @pytest.mark.parametrize("stranger", REFUSED.values(), ids=REFUSED)
    def test_block_without_selection_is_refused_by_name(self, stranger, model):
        with pytest.raises(AttachError, match=stranger.refused):
            balance_(model)

    @balanced_ones
    def test_zero_bias_changes_no_bit_and_no_global(self, stranger, model, x):
        plain = copy.deepcopy(model)
        expected, gradients = step(plain, stranger, x)
        outside = kept_outside(stranger.shared)
        clear_(stranger.shared)
        balanced = attached(stranger, model)
        output, ours = take_step(stranger, model, x)
        assert torch.equal(output, expected)
        assert gradients.keys() == ours.keys()
        assert all(torch.equal(gradient, ours[name]) for name, gradient in gradients.items())
        keys, lengths, values = kept_outside(stranger.shared)
        assert [keys, lengths] == outside[:2]
        assert all(torch.equal(*pair) for pair in zip(values, outside[2], strict=True))
        assert [site.counts.sum() for site in balanced.values()] == [T * stranger.top_k] * 2

    @sizes
    @balanced_ones
    def test_bias_selects_as_the_reference_and_stays_out_of_gate_weights(self, stranger, model, x, size):
        balanced = attached(stranger, model)
        biased_(balanced, size)
        layer, site, seen = model.layers[0], next(iter(balanced.values())), []
        site.witnesses["test"] = lambda selection, _: seen.append(
            selection.expert_ids_TK.reshape(T, -1).clone()
        )
        counts_E = torch.zeros(E, dtype=torch.int64)
        for seed in (1, 2):  # the first forward proves, the second does not
            output = run(stranger, model, x, seed)
            torch.manual_seed(seed)
            with torch.no_grad():
                ids_TK, expected = stranger.reference(layer, x, site.bias)
            counts_E += ids_TK.flatten().bincount(minlength=E)
            found, wanted = seen[-1], ids_TK
            if not stranger.in_order:
                found, wanted = found.sort().values, wanted.sort().values
            assert torch.equal(found, wanted)
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
            assert site.counts.tolist() == counts_E.tolist()
        assert len(seen) == 2

    @balanced_ones
    def test_update_moves_every_bias(self, stranger, model, x):
        balanced = attached(stranger, model, rule=Sign(rate=0.1))
        take_step(stranger, model, x)
        expected = {name: after_sign(site.bias, site.counts, 0.1) for name, site in balanced.items()}
        before = {name: site.bias.clone() for name, site in balanced.items()}
        balanced.update()
        torch.testing.assert_close({name: site.bias for name, site in balanced.items()}, expected)
        assert not any(torch.equal(site.bias, before[name]) for name, site in balanced.items())

    @balanced_ones
    def test_attaching_leaves_no_trace_and_remove_restores(self, stranger, model, x):
        run(stranger, copy.deepcopy(model), x, 0)  # fills caches of generators
        outside, before = kept_outside(stranger.shared), attributes(model)
        values = {name: value.clone() for name, value in model.state_dict().items()}
        random = torch.get_rng_state()
        attached(stranger, model).remove()
        assert torch.equal(torch.get_rng_state(), random)
        assert same(attributes(model), before)
        assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
        keys, lengths, tensors = kept_outside(stranger.shared)
        assert [keys, lengths] == outside[:2]
        assert all(torch.equal(*pair) for pair in zip(tensors, outside[2], strict=True))

    @balanced_ones
    def test_attaching_before_any_forward_fills_no_global(self, stranger, model, x):
        outside = kept_outside(stranger.shared)[:2]
        attached(stranger, model)
        assert kept_outside(stranger.shared)[:2] == outside
        run(stranger, model, x, 0)

    @balanced_ones
    def test_copy_routes_alike_and_counts_for_itself(self, stranger, model, x):
        balanced = attached(stranger, model)
        biased_(balanced, 0.3)
        copied = copy.deepcopy(model)
        output, again = (run(stranger, each, x, 3) for each in (model, copied))
        assert torch.equal(output, again)
        site, other = (next(iter(find_balanced(each).values())) for each in (model, copied))
        assert site.counts.tolist() == other.counts.tolist()
        assert site.counts.sum() == T * stranger.top_k

    @pytest.mark.parametrize("use_reentrant", [False, True])
    @balanced_ones
    def test_recomputed_forward_counts_once_and_selects_alike(self, stranger, model, x, use_reentrant):
        balanced = attached(stranger, model)
        biased_(balanced, 0.3)
        results = []
        for each in (copy.deepcopy(model), model):
            run(stranger, each, x, 3)  # the first forward proves, and may leave state
            balanced.discard_counts_()
            leaf, layer = x.clone().requires_grad_(), each.layers[0]
            torch.manual_seed(4)
            if each is model:
                output = checkpoint(lambda y, layer=layer: first(layer(y)), leaf, use_reentrant=use_reentrant)
            else:
                output = first(layer(leaf))
            output.square().mean().backward()
            results.append((output.detach(), leaf.grad))
        site = next(iter(balanced.values()))
        assert site.counts.sum() == T * stranger.top_k
        torch.testing.assert_close(results[0], results[1])

    @balanced_ones
    def test_bf16_selects_as_the_reference_with_an_fp32_bias(self, stranger, model, x):
        model, x = model.to(torch.bfloat16), x.bfloat16()
        try:
            first(copy.deepcopy(model).layers[0](x))
        except RuntimeError as error:
            pytest.skip(f"the block itself does not run in bf16: {error}")
        balanced = attached(stranger, model)
        biased_(balanced, 0.3)
        layer, site = model.layers[0], next(iter(balanced.values()))
        output = run(stranger, model, x, 3)
        assert site.bias.dtype == torch.float32
        torch.manual_seed(3)
        with torch.no_grad():
            ids_TK, expected = stranger.reference(layer, x, site.bias)
        assert site.counts.tolist() == ids_TK.flatten().bincount(minlength=E).tolist()
        torch.testing.assert_close(output.float(), expected.float(), atol=0.05, rtol=0.05)


@pytest.mark.slow  # many graph breaks make a block take ten seconds or more to compile
class TestCompiled:
    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    @balanced_ones
    def test_compiled_block_selects_and_counts_as_the_eager_one(self, stranger, model, x, backend):
        torch._dynamo.reset()
        balanced = attached(stranger, model)
        biased_(balanced, 0.3)
        layer, site = model.layers[0], next(iter(balanced.values()))
        expected = run(stranger, model, x, 3)
        counts_E = site.counts.clone()
        compiled = torch.compile(layer, backend=backend)
        for times in (2, 3):
            torch.testing.assert_close(run(stranger, model, x, 3, compiled), expected, atol=1e-5, rtol=1e-4)
            assert site.counts.tolist() == (counts_E * times).tolist()
