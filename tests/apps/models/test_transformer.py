from __future__ import annotations

import copy
import math

import pytest
import torch

from moe_plugin.experts import MoEBlock, SwiGLU
from moe_plugin.losses import (
    GlobalBatchLoss,
    LoadBalancingLoss,
    RouterZLoss,
    SequenceLoss,
    TotalLoss,
    load_statistics,
)
from moe_plugin.routing import Sigmoid, SoftmaxAfterTopK
from tests.apps.models.small_models import VOCAB_SIZE, language_model, token_batch


def losses_and_gradients(model, batch):
    cross_entropy, auxiliary = model._losses(batch)
    (cross_entropy + auxiliary).backward()
    return cross_entropy, auxiliary, [parameter.grad for parameter in model.parameters()]


def normalized(scores_TE):
    return scores_TE / scores_TE.sum(-1, keepdim=True)


def every_loss():
    kinds = (LoadBalancingLoss, SequenceLoss, GlobalBatchLoss, RouterZLoss)
    return TotalLoss({kind.__name__: kind(0.5) for kind in kinds})


class TestTransformer:
    def test_later_tokens_do_not_change_earlier_logits(self):
        model, tokens = language_model(), token_batch(2)["tokens"]
        changed = tokens.clone()
        changed[:, 6:] = (changed[:, 6:] + 1) % VOCAB_SIZE
        torch.testing.assert_close(model(tokens)[:, :6], model(changed)[:, :6])

    def test_fresh_model_predicts_uniformly(self):
        loss, _ = language_model()._losses(token_batch(8))
        assert loss.item() == pytest.approx(math.log(VOCAB_SIZE), abs=0.1)

    def test_tied_embedding_is_the_output_projection(self):
        model = language_model(tie_embeddings=True)
        assert model.network.head is None
        hidden = {}
        model.network.norm.register_forward_hook(lambda _, __, y: hidden.update(y=y))
        logits = model(token_batch(2)["tokens"])
        torch.testing.assert_close(logits, hidden["y"] @ model.network.embedding.weight.T)

    def test_residual_projections_start_smaller_in_deeper_models(self):
        layers = language_model(num_layers=8, dim=64).network.layers
        for weight in (layers[0].attention.out.weight, layers[0].feed_forward.experts.down):
            fan_in = 64 if weight.ndim == 2 else weight.shape[1]
            assert weight.std().item() == pytest.approx((16 * fan_in) ** -0.5, rel=0.1)

    @pytest.mark.parametrize("tie_embeddings", [False, True])
    def test_materialised_from_meta_trains(self, tie_embeddings):
        with torch.device("meta"):
            model = language_model(tie_embeddings=tie_embeddings)
        model.to_empty(device="cpu")
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        loss, _ = model._losses(token_batch(8))
        loss.backward()
        assert loss.item() == pytest.approx(math.log(VOCAB_SIZE), abs=0.1)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class TestLayout:
    @pytest.mark.parametrize(
        ("num_dense", "moe_every", "expected"),
        [
            (0, 1, [1, 1, 1, 1]),
            (1, 1, [0, 1, 1, 1]),
            (0, 2, [0, 1, 0, 1]),
            (1, 2, [0, 0, 1, 0]),
            (4, 1, [0] * 4),
        ],
    )
    def test_layers_with_experts_are_as_asked(self, num_dense, moe_every, expected):
        model = language_model(num_layers=4, num_dense=num_dense, moe_every=moe_every)
        kinds = [type(layer.feed_forward) for layer in model.network.layers]
        assert kinds == [MoEBlock if has_experts else SwiGLU for has_experts in expected]


class TestActivationCheckpointing:
    @pytest.mark.parametrize("mode", ["reentrant", "non_reentrant"])
    @pytest.mark.parametrize("score", [Sigmoid(), SoftmaxAfterTopK()], ids=repr)
    def test_losses_and_gradients_are_bit_equal_with_auxiliary_loss(self, mode, score):
        plain = language_model(score, auxiliary_loss=every_loss())
        checkpointed = copy.deepcopy(plain)
        for layer in checkpointed.network.layers:
            layer.activation_checkpointing = mode
        batch = token_batch(4)
        expected, actual = losses_and_gradients(plain, batch), losses_and_gradients(checkpointed, batch)
        assert torch.equal(expected[0], actual[0])
        assert torch.equal(expected[1], actual[1])
        assert all(torch.equal(a, b) for a, b in zip(expected[2], actual[2], strict=True))

    @pytest.mark.parametrize("mode", [None, "reentrant", "non_reentrant"])
    def test_router_is_recomputed_in_the_backward_only_when_asked(self, mode):
        model, calls = language_model(activation_checkpointing=mode), []
        model.network.layers[0].feed_forward.router.register_forward_hook(lambda *_: calls.append(1))
        model._losses(token_batch(2))[0].backward()
        assert len(calls) == (1 if mode is None else 2)


class TestAuxiliaryLoss:
    def test_layers_are_summed(self):
        loss = LoadBalancingLoss(0.5)
        model, routings = language_model(auxiliary_loss=loss), []
        for layer in model.network.layers:
            layer.feed_forward.router.register_forward_hook(lambda _, __, routing: routings.append(routing))
        _, auxiliary = model._losses(token_batch(4))
        assert len(routings) == 2
        by_layer = [load_statistics(routing, normalized(routing.scores_TE), 4) for routing in routings]
        torch.testing.assert_close(auxiliary, sum(loss([statistics]) for statistics in by_layer))

    def test_logits_count_as_their_softmax(self):
        loss = LoadBalancingLoss(0.5)
        model, routings = language_model(SoftmaxAfterTopK(), num_layers=1, auxiliary_loss=loss), []
        router = model.network.layers[0].feed_forward.router
        router.register_forward_hook(lambda _, __, routing: routings.append(routing))
        _, auxiliary = model._losses(token_batch(4))
        statistics = load_statistics(routings[0], routings[0].scores_TE.softmax(-1), 4)
        torch.testing.assert_close(auxiliary, loss([statistics]))

    def test_hooks_are_gone_after_the_forward(self):
        model = language_model(auxiliary_loss=LoadBalancingLoss(0.5))
        model._losses(token_batch(2))
        assert not model.network.layers[0].feed_forward.router._forward_hooks

    def test_dense_model_has_none(self):
        _, auxiliary = language_model(num_dense=2, auxiliary_loss=LoadBalancingLoss(0.5))._losses(
            token_batch(2)
        )
        assert auxiliary.item() == 0
