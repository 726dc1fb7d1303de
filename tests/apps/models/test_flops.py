from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_plugin.apps.models.flops import attention_flops, matmul_flops
from moe_plugin.attach.discovery.routed_experts import find_routed_experts
from moe_plugin.experts import ExpertShape
from tests.apps.models.small_models import language_model, token_batch


class TestMatmulFlops:
    @pytest.mark.parametrize("tie_embeddings", [False, True])
    @pytest.mark.parametrize("num_shared", [0, 1])
    def test_equal_to_the_operations_that_torch_counts(self, tie_embeddings, num_shared):
        # fp64 takes the expert loop, whose products FlopCounterMode knows.
        experts = ExpertShape(4, 2, 8, num_shared)
        model = language_model(
            tie_embeddings=tie_embeddings, experts=experts, num_layers=3, num_dense=1
        ).double()
        tokens = token_batch(2)["tokens"][:, :-1]
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(tokens)
        counted = counter.get_flop_counts()["Global"]
        products = sum(flops for op, flops in counted.items() if "attention" not in str(op))
        assert matmul_flops(model, find_routed_experts(model)) * tokens.numel() == products


class TestAttentionFlops:
    def test_equal_to_a_sum_over_positions(self):
        model = language_model(dim=32, num_heads=4)
        # Each position: a product and a sum per past position and head width, for scores and for values.
        per_layer = [2 * 2 * 32 * (position + 1) for position in range(12)]
        assert attention_flops(model, 12) == 2 * sum(per_layer) / 12

    def test_model_without_attention_has_none(self):
        assert attention_flops(torch.nn.Linear(4, 4), 12) == 0
