from __future__ import annotations

import sys

import pytest

from moe_plugin.apps.models import deepseek_v3, measure
from moe_plugin.errors import ConfigError

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 8,
    "n_group": 4,
    "topk_group": 2,
}


class TestDeepseekV3:
    def test_small_size_matches_a_count_by_hand(self):
        pytest.importorskip("transformers")
        size = measure(deepseek_v3(**SMALL), context_length=9)
        idle_expert = 3 * 32 * 8
        assert size.total_parameters - size.active_parameters == 2 * (16 - 4) * idle_expert
        assert size.attention_flops_per_token == 3 * 2 * (12 + 8) * 10

    def test_unknown_key_is_named(self):
        pytest.importorskip("transformers")
        message = r"'model' must have keys of transformers' DeepseekV3Config only, got \['num_expert'\]"
        with pytest.raises(ConfigError, match=message):
            deepseek_v3(num_expert=3)

    def test_without_transformers_names_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(
            ConfigError, match=r"needs the package 'transformers'\. Run: pip install 'moe_plugin\[hf\]'"
        ):
            deepseek_v3()
