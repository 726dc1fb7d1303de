from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_plugin.errors import ConfigError
from moe_plugin.routing import Router, Sigmoid, SoftmaxAfterTopK, SoftmaxBeforeTopK, SqrtSoftplus

SCORES = [Sigmoid(), SqrtSoftplus(), SoftmaxBeforeTopK(), SoftmaxAfterTopK()]


def reference_weights(router: Router, x_D: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """Gate weights of one token in fp64, straight from the papers' formulas."""
    logits_E = router.weight.detach().double() @ x_D.double()
    selected = {
        Sigmoid: lambda: (1 / (1 + torch.exp(-logits_E)))[ids],
        SqrtSoftplus: lambda: torch.log1p(torch.exp(logits_E))[ids] ** 0.5,
        SoftmaxBeforeTopK: lambda: (logits_E.exp() / logits_E.exp().sum())[ids],
        SoftmaxAfterTopK: lambda: logits_E[ids].exp() / logits_E[ids].exp().sum(),
    }[type(router.score)]()
    return router.scale * (selected / selected.sum() if router.normalize else selected)


@pytest.fixture
def router() -> Router:
    return Router(8, 16, 4, score=Sigmoid(), normalize=True, scale=2.5, num_groups=4, top_k_groups=2)


class TestForward:
    @pytest.mark.parametrize("score", SCORES, ids=repr)
    @pytest.mark.parametrize("normalize", [False, True])
    def test_random_input_matches_reference(self, score, normalize):
        router = Router(8, 16, 3, score=score, normalize=normalize, scale=1.5)
        router.expert_bias.normal_()
        x_TD = torch.randn(20, 8)
        routing = router(x_TD)
        biased_TE = routing.scores_TE + router.expert_bias
        for token in range(20):
            ids = routing.expert_ids_TK[token].tolist()
            assert ids == biased_TE[token].argsort(descending=True)[:3].tolist()
            expected_K = reference_weights(router, x_TD[token], ids)
            torch.testing.assert_close(routing.weights_TK[token].double(), expected_K, atol=1e-5, rtol=1e-4)

    @settings(max_examples=20, deadline=None)
    @given(seed=st.integers(0, 2**31), score=st.sampled_from(SCORES))
    def test_bias_moves_selection_but_no_score(self, seed, score):
        torch.manual_seed(seed)
        router, x_TD = Router(8, 16, 2, score=score), torch.randn(6, 8)
        before = router(x_TD)
        router.expert_bias[5] = 100.0
        after = router(x_TD)
        assert torch.equal(before.scores_TE, after.scores_TE)
        assert (after.expert_ids_TK == 5).any(-1).all()
        selected_TK = score.weights(after.scores_TE.gather(-1, after.expert_ids_TK))
        torch.testing.assert_close(after.weights_TK, selected_TK)

    def test_experts_permuted_permutes_ids_only(self):
        router = Router(8, 16, 4, score=Sigmoid(), normalize=True)
        router.expert_bias.normal_(std=0.1)
        permuted, order = copy.deepcopy(router), torch.randperm(16)
        permuted.weight.data, permuted.expert_bias = router.weight.data[order], router.expert_bias[order]
        x_TD = torch.randn(20, 8)
        expected, actual = router(x_TD), permuted(x_TD)
        assert torch.equal(order[actual.expert_ids_TK], expected.expert_ids_TK)
        torch.testing.assert_close(actual.weights_TK, expected.weights_TK)

    def test_groups_limit_each_token_to_its_groups(self, router):
        router.expert_bias.uniform_(-3, -2)
        groups_TK = router(torch.randn(50, 8)).expert_ids_TK // 4
        assert all(len(set(groups)) <= 2 for groups in groups_TK.tolist())

    def test_no_gradient_reaches_the_bias(self, router):
        x_TD = torch.randn(5, 8)
        routing = router(x_TD)
        routing.weights_TK.square().sum().backward()
        assert not router.expert_bias.requires_grad
        weight = router.weight.detach().double().requires_grad_()
        selected_TK = (x_TD.double() @ weight.T).sigmoid().gather(-1, routing.expert_ids_TK)
        (router.scale * selected_TK / selected_TK.sum(-1, keepdim=True)).square().sum().backward()
        torch.testing.assert_close(router.weight.grad.double(), weight.grad, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_routes_in_fp32(self, router, dtype):
        x_TD = torch.randn(50, 8)
        expected = router(x_TD)
        with torch.autocast("cpu", dtype=dtype):
            actual = router(x_TD)
        assert all(torch.equal(a, b) for a, b in zip(actual[:3], expected[:3], strict=True))

    def test_bf16_module_computes_in_fp32(self, router):
        x_TD = torch.randn(50, 8).bfloat16()
        routing = router.bfloat16()(x_TD)
        expected_TE = (x_TD.double() @ router.weight.double().T).sigmoid()
        assert routing.scores_TE.dtype == routing.weights_TK.dtype == torch.float32
        torch.testing.assert_close(routing.scores_TE.double(), expected_TE, atol=1e-6, rtol=1e-6)

    def test_no_token_gives_empty_routing(self, router):
        routing = router(torch.randn(0, 8))
        assert routing.weights_TK.shape == routing.expert_ids_TK.shape == (0, 4)

    def test_all_scores_underflowed_gives_finite_weights(self):
        router = Router(8, 16, 4, score=Sigmoid(), normalize=True)
        torch.nn.init.constant_(router.weight, -1e3)
        assert router(torch.ones(2, 8)).weights_TK.isfinite().all()


class TestBias:
    @pytest.mark.parametrize(
        "cast",
        [
            lambda r: r.to(torch.bfloat16),
            lambda r: r.half(),
            lambda r: torch.nn.Sequential(r).to(torch.bfloat16)[0],
            lambda r: copy.deepcopy(r).bfloat16(),
            lambda r: pickle.loads(pickle.dumps(r)).half(),
            lambda r: r.double(),
            lambda r: r.to("cpu", torch.bfloat16),
        ],
    )
    def test_cast_keeps_value_in_fp32(self, router, cast):
        router.expert_bias.fill_(0.501)
        router = cast(router)
        assert router.expert_bias.dtype == torch.float32
        assert torch.equal(router.expert_bias, torch.full((16,), 0.501))

    def test_cast_keeps_the_very_tensor(self, router):
        bias = router.expert_bias
        assert router.bfloat16().expert_bias is bias

    def test_state_dict_round_trip_is_exact(self, router):
        router.expert_bias.normal_()
        loaded = Router(8, 16, 4, score=Sigmoid()).bfloat16()
        loaded.load_state_dict(router.state_dict())
        assert torch.equal(loaded.expert_bias, router.expert_bias)

    def test_assigned_bf16_state_becomes_fp32(self, router):
        state = {name: value.bfloat16() for name, value in router.state_dict().items()}
        router.load_state_dict(state, assign=True)
        assert router.expert_bias.dtype == torch.float32
        assert state["expert_bias"].dtype == torch.bfloat16

    def test_missing_bias_in_state_is_named(self, router):
        with pytest.raises(RuntimeError, match="expert_bias"):
            router.load_state_dict({"weight": router.weight})

    def test_materialised_from_meta_is_zero(self):
        with torch.device("meta"):
            router = Router(8, 16, 4, score=Sigmoid())
        router.bfloat16().to_empty(device="cpu")
        router.expert_bias.fill_(torch.nan)
        router.reset_parameters()
        assert router.expert_bias.dtype == torch.float32
        assert torch.equal(router.expert_bias, torch.zeros(16))
        assert router.weight.isfinite().all()


class TestValidation:
    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ({"top_k": 9}, r"'top_k' must be <= num_experts \(8\), got 9\."),
            ({"top_k": 0}, "'top_k' must be an integer >= 1, got 0"),
            ({"num_experts": 0}, "'num_experts' must be an integer >= 1, got 0"),
            ({"dim": 0}, "'dim' must be an integer >= 1, got 0"),
            ({"scale": 0.0}, "'scale' must be a number > 0, got 0.0"),
            ({"num_groups": 3}, r"'num_groups' must divide num_experts \(8\), got 3"),
            ({"num_groups": 0}, "'num_groups' must be an integer >= 1, got 0"),
            ({"num_groups": 2, "top_k_groups": 0}, "'top_k_groups' must be an integer >= 1, got 0"),
            (
                {"num_groups": 2, "top_k_groups": 3},
                r"'top_k_groups' must be <= num_groups \(2\), got 3",
            ),
            (
                {"num_groups": 8, "top_k_groups": 4},
                r"'num_groups' must leave at least 2 of 8 experts .*, got 8\. Set num_groups <= 4 with top_k_groups",
            ),
            (
                {"num_groups": 4, "top_k": 3},
                r"'top_k' must be <= the experts in the chosen groups \(1 of 2 experts\), got 3\. Raise",
            ),
        ],
    )
    def test_bad_size_names_the_fix(self, sizes, message):
        build = partial(Router, **({"dim": 4, "num_experts": 8, "top_k": 2} | sizes), score=Sigmoid())
        with pytest.raises(ConfigError, match=message):
            build()

    def test_repr_shows_sizes(self, router):
        assert repr(router) == "Router(dim=8, num_experts=16, top_k=4, score=Sigmoid())"
