from __future__ import annotations

import copy
import pickle
import shutil

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from moe_plugin import Sign, balance_, shard_
from moe_plugin.attach.fused.host_forward import FusedHostExperts
from moe_plugin.errors import AttachError, EffectError
from tests.hosts import OwningRouter
from tests.stacked_hosts import InputFirstExperts, StackedBlock, StackedExperts, StackedHost

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
KINDS = pytest.mark.parametrize("kind", [StackedExperts, InputFirstExperts])


def tokens(seed=0):
    return torch.randint(0, 32, (3, 7), generator=torch.Generator().manual_seed(seed))


def twins(kind=StackedExperts, **sizes):
    """A host, and the same with fused experts."""
    torch.manual_seed(0)
    model = StackedHost(kind, **sizes)
    fused = copy.deepcopy(model)
    return model, fused, balance_(fused, Sign(rate=0.1), experts="fused")


def step(model, run=None):
    """Logits and gradients of a step."""
    model.zero_grad()
    logits = (model if run is None else run)(tokens())
    functional.cross_entropy(logits.flatten(0, 1).float(), tokens(1).flatten()).backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_step(one, other, **tolerance):
    tolerance = tolerance or {"atol": 1e-5, "rtol": 1e-4}
    (logits, gradients), (logits2, gradients2) = one, other
    torch.testing.assert_close(logits2, logits, **tolerance)
    assert gradients2.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients2[name], gradient, msg=f"gradient of {name}", **tolerance)


class TestComputation:
    @KINDS
    def test_outputs_and_gradients_are_those_of_the_host(self, kind):
        model, fused, balanced = twins(kind)
        assert list(balanced.fused) == ["layers.0.experts", "layers.1.experts"]
        assert_same_step(step(model), step(fused))

    @KINDS
    def test_fp64_is_as_exact(self, kind):
        model, fused, _ = twins(kind)
        assert_same_step(step(model.double()), step(fused.double()), atol=1e-12, rtol=1e-10)

    @KINDS
    def test_bf16_is_within_its_rounding(self, kind):
        model, fused, _ = twins(kind)
        assert_same_step(step(model.bfloat16()), step(fused.bfloat16()), atol=0.02, rtol=0.1)

    @KINDS
    def test_autocast_computes_in_bf16_and_returns_the_host_s_dtype(self, kind):
        model, fused, _ = twins(kind)
        with torch.autocast("cpu", torch.bfloat16):
            assert_same_step(step(model), step(fused), atol=0.02, rtol=0.1)
        for module in (model, fused):
            x_TD, ids_TK = torch.randn(5, 8), torch.randint(0, 4, (5, 2))
            with torch.autocast("cpu", torch.bfloat16):
                assert module.layers[0].experts(x_TD, ids_TK, torch.rand(5, 2)).dtype == torch.float32

    def test_gradients_lie_in_memory_as_their_weights_do(self):
        for kind in (StackedExperts, InputFirstExperts):
            _, fused, _ = twins(kind)
            step(fused)
            for parameter in fused.layers[0].experts.parameters():
                assert parameter.grad.stride() == parameter.stride()

    @KINDS
    def test_experts_without_tokens_have_a_gradient_of_zero(self, kind):
        model, fused, balanced = twins(kind)
        for site in (*balanced.values(), *balance_(model).values()):
            site.bias[:2] -= 100
        assert_same_step(step(model), step(fused))
        for parameter in fused.layers[0].experts.parameters():
            assert parameter.grad[:2].count_nonzero() == 0

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_activation_checkpointing_changes_nothing(self, use_reentrant):
        model, fused, balanced = twins()

        def run(ids):
            x = fused.embedding(ids)
            for layer in fused.layers:
                x = checkpoint(layer, x, use_reentrant=use_reentrant)
            return fused.head(x)

        assert_same_step(step(model), step(fused, run))
        assert all(site.counts.sum() == 3 * 7 * 2 for site in balanced.values())

    def test_keyword_calls_work(self):
        _, fused, _ = twins()
        experts, x_TD = fused.layers[0].experts, torch.randn(5, 8)
        routing = {"top_k_index": torch.randint(0, 4, (5, 2)), "top_k_weights": torch.rand(5, 2)}
        assert torch.equal(experts(hidden_states=x_TD, **routing), experts(x_TD, *routing.values()))


class TestCompile:
    @KINDS
    @pytest.mark.parametrize(
        "backend", ["aot_eager", pytest.param("inductor", marks=[NEEDS_COMPILER, pytest.mark.slow])]
    )
    @pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated.*:DeprecationWarning")
    @pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
    def test_a_block_is_one_graph_that_gives_the_same(self, kind, backend):
        torch.compiler.reset()
        model, fused, balanced = twins(kind)
        compiled = torch.compile(fused, fullgraph=True, backend=backend)
        expected = step(model)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(2):
                assert_same_step(expected, step(fused, compiled))
        balanced.update()


class TestBalancing:
    def test_counts_bias_and_selection_are_as_without(self):
        model, fused, balanced = twins()
        plain = balance_(model, Sign(rate=0.1))
        for _ in range(3):
            step(model)
            step(fused)
            one, other = plain.update(), balanced.update()
            for name in plain:
                assert torch.equal(one.counts[name], other.counts[name])
                assert torch.equal(one.bias[name], other.bias[name])

    def test_bias_of_the_host_is_driven_too(self):
        model = StackedHost(block=lambda experts: StackedBlock(experts, OwningRouter))
        plain = copy.deepcopy(model)
        for each, experts in ((model, "fused"), (plain, None)):
            balanced = balance_(each, Sign(rate=0.1), experts=experts)
            step(each)
            balanced.update()
        for ours, theirs in zip(model.layers, plain.layers, strict=True):
            assert ours.router.e_score_correction_bias.any()
            assert torch.equal(ours.router.e_score_correction_bias, theirs.router.e_score_correction_bias)

    def test_sites_choose_experts_too(self):
        model = StackedHost()
        assert list(balance_(model, sites="layers.1.*", experts="fused").fused) == ["layers.1.experts"]
        assert not isinstance(model.layers[0].experts, FusedHostExperts)


class TestHost:
    def test_parameters_and_keys_are_the_host_s(self):
        model, fused, _ = twins()
        assert list(fused.state_dict()) == list(model.state_dict())
        assert repr(fused) == repr(model)
        parameters = dict(model.named_parameters())
        balance_(model, experts="fused")
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())

    def test_remove_gives_the_untouched_host_back(self):
        model = StackedHost()
        untouched = {name: (type(part), dict(vars(part))) for name, part in model.named_modules()}
        balanced = balance_(model, experts="fused")
        step(model)
        balanced.remove()
        assert {name: (type(part), vars(part)) for name, part in model.named_modules()} == untouched

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies_are_fused_and_can_be_removed(self, copied):
        model, fused, _ = twins()
        other = copied(fused)
        assert isinstance(other.layers[0].experts, FusedHostExperts)
        assert_same_step(step(model), step(other))
        balance_(other, Sign(rate=0.1), experts="fused").remove()
        assert type(other.layers[0].experts) is StackedExperts
        assert isinstance(fused.layers[0].experts, FusedHostExperts)

    def test_model_on_the_meta_device_is_fused_before_it_has_values(self):
        model, _, _ = twins()
        with torch.device("meta"):
            fused = StackedHost()
        balance_(fused, experts="fused")
        fused.to_empty(device="cpu").load_state_dict(model.state_dict())
        assert_same_step(step(model), step(fused))

    def test_shared_layer_is_fused_once(self):
        model = StackedHost()
        model.layers[1].experts = model.layers[0].experts
        balanced = balance_(model, experts="fused")
        step(model)
        balanced.update()
        balanced.remove()
        assert type(model.layers[0].experts) is StackedExperts


class TestRefusals:
    def test_nothing_is_changed_when_a_layer_cannot_be_replaced(self):
        model = StackedHost()
        model.layers[1].experts.gated = lambda gate_NH, up_NH: gate_NH * up_NH
        untouched = {name: (type(part), dict(vars(part))) for name, part in model.named_modules()}
        with pytest.raises(AttachError, match=r"'layers\.1\.experts': it computes something else"):
            balance_(model, experts="fused")
        assert {name: (type(part), vars(part)) for name, part in model.named_modules()} == untouched

    def test_other_setting_on_a_balanced_model_is_an_error(self):
        model = StackedHost()
        balance_(model)
        with pytest.raises(AttachError, match="balanced already"):
            balance_(model, experts="fused")

    def test_weights_that_are_used_without_calling_their_layer_are_an_error(self):
        class Around(StackedBlock):
            def forward(self, x):
                experts = self.experts
                weights_TK, ids_TK = self.router(x.flatten(0, 1))
                return x + StackedExperts.forward(experts, x.flatten(0, 1), ids_TK, weights_TK).view_as(x)

        model = StackedHost(block=Around)
        balanced = balance_(model, experts="fused")
        step(model)
        with pytest.raises(EffectError, match=r"'layers\.0\.experts' were not called in the first step"):
            balanced.update()

    def test_experts_that_are_spread_over_ranks_already_are_refused(self, on_ranks):
        assert "something else has replaced its forward already" in on_ranks(2, fuse_after_spreading)[0]


def fuse_after_spreading(rank, results):
    model = StackedHost()
    shard_(model, init_device_mesh("cpu", (2,)), expert_parallel_size=2)
    try:
        balance_(model, experts="fused")
    except AttachError as error:
        results[rank] = str(error)


class TestRanks:
    @pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp_before", "expert_parallel"])
    @pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
    def test_two_ranks_have_the_gradients_of_one(self, on_ranks, how):
        results = on_ranks(2, step_on_rank, how)
        model, _, _ = twins()
        expected = step(model)[1]
        for rank in range(2):
            for name, gradient in results[rank].items():
                torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


def step_on_rank(rank, results, how):
    """Both ranks see the same tokens."""
    torch.manual_seed(0)
    fused, mesh = StackedHost(), init_device_mesh("cpu", (2,))
    if how == "fsdp_before":
        shard_(fused, mesh)
    balanced = balance_(fused, Sign(rate=0.1), experts="fused")
    if how in ("fsdp", "expert_parallel"):
        shard_(fused, mesh, expert_parallel_size=2 if how == "expert_parallel" else 1)
    _, gradients = step(fused, DistributedDataParallel(fused) if how == "ddp" else fused)
    balanced.update()
    whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}
    results[rank] = whole
