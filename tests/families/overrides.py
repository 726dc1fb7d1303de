"""What the general shrinking of a config does not get right, by family: fields to set, as data.

A name with dots reaches into nested configs; None as the family's entry means that it has no routed experts.
"""

from __future__ import annotations

from typing import Any

# Where the first class that can be built is not the one to test.
MODEL_CLASSES: dict[str, list[str]] = {"llama4": ["Llama4ForCausalLM"]}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "dbrx": {
        "attn_config.rope_theta": 10000.0,
        "attn_config.kv_n_heads": 2,
        "ffn_config.ffn_hidden_size": 32,
        "ffn_config.hidden_size": 64,
        "ffn_config.moe_num_experts": 8,
        "ffn_config.moe_top_k": 2,
        "attn_config.clip_qkv": 8.0,
    },
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse"],
        "text_config.num_experts_per_tok": 2,
        "text_config.n_group": 1,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma": {
        "text_config.num_experts": 8,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 32,
    },
    "doge": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "mlp_layer_types": None,
    },
    "dots3_note": {
        "text_config.layer_types": ["indexed_attention"] * 2,
        "text_config.per_layer_config": {},
        "text_config.head_dim": 32,
    },
    "ernie4_5_vl_moe": {"text_config.rope_parameters.mrope_section": [2, 2, 4]},
    "flint": {"mlp_only_layers": [0]},
    "gemma4": {
        "text_config.enable_moe_block": True,
        "text_config.num_experts": 8,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 32,
    },
    "glm4v_moe": {
        "text_config.rope_parameters.partial_rotary_factor": 1.0,
        "text_config.rope_parameters.mrope_section": [4, 2, 2],
    },
    "glm5_next": {"text_config.index_kpool": 4},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 8, "moe_topk": 2},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4": {"text_config.moe_layers": [0, 1], "text_config.num_experts_per_tok": 2},
    "mimo_v2_flash": {
        "rope_parameters.full_attention.partial_rotary_factor": 1.0,
        "rope_parameters.sliding_attention.partial_rotary_factor": 1.0,
        "num_key_value_heads": 2,
    },
    "mistral4": {"rope_parameters.partial_rotary_factor": 1.0},
    "mistral_large4": {"text_config.kv_source_layers": [0, 1]},
    "nemotron3_5_transcribe": {
        "text_config.n_groups": 2,
        "text_config.layers_block_type": ["moe", "full_attention"],
    },
    "nemotron_h": {"n_groups": 2},
    "qwen3_omni_moe": {"vision_start_token_id": 101},
    "qwen4_exp": {
        "text_config.indexer_n_heads": 4,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_head_dim": 16,
        "text_config.indexer_budget": 16,
        "text_config.indexer_compress_ratio": 4,
    },
    "step3p7": {"text_config.sliding_window": 16},
    "vitpose_backbone": {"num_experts": 4, "part_features": 16},
}
