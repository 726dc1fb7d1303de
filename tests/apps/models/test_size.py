from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from torch import nn

from moe_plugin.apps.models import measure, print_size_table, size_table
from moe_plugin.errors import ConfigError
from moe_plugin.experts import ExpertShape
from tests.apps.models.small_models import language_model


class TestMeasure:
    def test_parameters_match_a_count_by_hand(self):
        size = measure(language_model(experts=ExpertShape(4, 2, 8, num_shared=1)))
        expert, router, shared = 3 * 16 * 8, 4 * 16, 3 * 16 * 8
        layer = 2 * 16 + 4 * 16 * 16 + router + shared
        rest = 2 * 11 * 16 + 16
        assert size.total_parameters == rest + 2 * (layer + 4 * expert)
        assert size.active_parameters == rest + 2 * (layer + 2 * expert)
        assert size.embedding_parameters == 11 * 16
        assert size.context_length == 12

    def test_tied_embedding_counts_once(self):
        tied, untied = measure(language_model(tie_embeddings=True)), measure(language_model())
        assert untied.total_parameters - tied.total_parameters == 11 * 16
        assert untied.forward_flops_per_token == tied.forward_flops_per_token

    def test_training_is_three_forwards(self):
        size = measure(language_model())
        assert size.training_flops_per_token == 3 * size.forward_flops_per_token
        # Two layers; a product and a sum for scores and for values, at a width of 16 and (12 + 1) / 2 positions.
        assert size.attention_flops_per_token == 2 * 2 * 2 * 16 * (12 + 1) / 2

    def test_meta_device_gives_the_same(self):
        with torch.device("meta"):
            model = language_model()
        assert measure(model) == measure(language_model())

    def test_longer_context_adds_attention_only(self):
        short, long = (measure(language_model(), context_length=length) for length in (16, 64))
        added = long.attention_flops_per_token - short.attention_flops_per_token
        assert long.forward_flops_per_token - short.forward_flops_per_token == added == 2 * 2 * 16 * 48

    def test_memory_by_strategy_in_bytes(self):
        model = nn.Linear(10, 10, bias=False)
        single, ddp, fsdp = measure(model, num_devices=4).memory
        assert (single.parameters, single.gradients, single.optimizer) == (400, 400, 800)
        assert single.total == 1600
        assert ddp.total == 2000
        assert fsdp.total == 400

    def test_bf16_parameters_keep_fp32_moments(self):
        single = measure(nn.Linear(10, 10, bias=False).bfloat16()).memory[0]
        assert (single.parameters, single.gradients, single.optimizer) == (200, 200, 800)

    def test_frozen_parameters_have_no_gradients(self):
        single = measure(nn.Linear(10, 10, bias=False).requires_grad_(False)).memory[0]
        assert (single.parameters, single.gradients, single.optimizer) == (400, 0, 0)

    @pytest.mark.parametrize(("name", "value"), [("context_length", -1), ("num_devices", 0)])
    def test_bad_number_is_named(self, name, value):
        with pytest.raises(ConfigError, match=f"'{name}' must be an integer >= 1, got {value}"):
            measure(nn.Linear(2, 2), **{name: value})


class TestTable:
    def test_shows_counts_with_their_assumptions(self):
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(size_table(measure(language_model(), num_devices=16)))
        text = console.export_text()
        # By hand as above, without shared experts: embedding, head and norm; two layers of 4 experts.
        total = 2 * 11 * 16 + 16 + 2 * (2 * 16 + 4 * 16 * 16 + 4 * 16 + 4 * 3 * 16 * 8)
        for part in (
            "Parameters, total",
            f"{total:,}",
            "causal attention over 12 tokens",
            "fsdp over 16",
            "Adam in fp32",
        ):
            assert part in text

    def test_is_printed(self, capsys):
        print_size_table(measure(language_model()))
        assert "Model size" in capsys.readouterr().out


def test_number_of_experts_is_fixed_unless_a_router_lets_it_vary() -> None:
    from moe_plugin.apps.models.size import fixed_experts_per_token
    from moe_plugin.experts import GroupedExperts, MoEBlock
    from moe_plugin.routing import DynamicRouter, Router, Sigmoid, Threshold

    fixed = MoEBlock(Router(8, 4, 2, score=Sigmoid()), GroupedExperts(4, 8, 8))
    varying = MoEBlock(
        DynamicRouter(8, 4, 2, score=Sigmoid(), cut=Threshold(), max_k=4), GroupedExperts(4, 8, 8)
    )
    assert fixed_experts_per_token(torch.nn.ModuleList([fixed])) == 2
    assert fixed_experts_per_token(torch.nn.ModuleList([fixed, varying])) is None
    assert fixed_experts_per_token(torch.nn.Linear(2, 2)) is None
