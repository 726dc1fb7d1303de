"""Make a small config of any transformers family: the same model, a few thousand times smaller."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

NUM_LAYERS = 2
VOCABULARY = 128
FIRST_SPECIAL = 100
"""Ids of special tokens are moved into the small vocabulary, above those that the tests use."""

# The first pattern that matches a field's whole name gives its size; fields that no pattern names stay.
SIZES: tuple[tuple[str, int], ...] = (
    (r"(num_)?first_k_dense(_replace)?|num_dense_layers|moe_layer_start_index", 0),
    (r".*(mtp|nextn)(_predict)?_layers|num_kv_shared_layers|.*layerdrop", 0),
    (r"num_sparse_(en|de)coder_layers", 1),
    (r"(num_)?((en|de)coder_)?(hidden_)?layers|n_layers|num_layers|depth", NUM_LAYERS),
    (r"(en|de)coder_sparse_step|moe_layer_(interval|freq)|interleave_moe_layer_step", 1),
    (r"topk_group", 1),
    (r"n_group|num_expert_group", 2),
    (r"zero_expert_num", 2),
    (r"(num|n)_shared_experts|moe_num_shared_experts", 1),
    (r"(moe_)?(num|n)_(local_|routed_)?experts|moe_num_experts", 8),
    (r"num_experts_per_tok(en)?|moe_top_?k|top_k_experts|moe_k|num_selected_experts", 2),
    (r".*vocab_size.*", VOCABULARY),
    (r"max_position_embeddings|max_(source_|target_)?positions|n_ctx", 256),
    (r"(.*_)?(num_|n_)?(kv_|key_value_|attention_|global_)?heads|.*_attention_heads|.*_heads", 4),
    (r"(.*_)?qk_head_dim", 32),
    (r"(.*_)?head_dim|d_kv|kv_channels|.*_head_size", 16),
    (r".*lora_rank|.*_rank", 16),
    (r"(.*_)?intermediate(_hidden)?_size|(.*_)?ffn(_hidden)?_(dim|size)|d_ff|mlp_dim|.*expert_dim", 32),
    (r"(.*_)?hidden_(size|dim)|d_model|embed_dim|n_embd|out_hidden_size|.*_embed_dim|.*_output_dim", 64),
    (r"mamba_d_state|ssm_state_size|linear_state_size", 8),
    (r"(index_)?topk|index_top_?k", 8),
)
SIZES_BY_NAME = tuple((re.compile(pattern), size) for pattern, size in SIZES)
DERIVED = ("stage_names", "out_features", "out_indices")
DROPOUT = re.compile(r".*(dropout|pdrop|drop_path|jitter).*")


def shrink(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's fields, nested configs included, with every size small and every dropout zero."""
    length = next(
        (fields[name] for name in ("num_hidden_layers", "n_layers", "depth") if name in fields), None
    )
    return {name: _smaller(name, value, length) for name, value in fields.items() if name not in DERIVED}


def _smaller(name: str, value: Any, length: int | None) -> Any:
    if isinstance(value, Mapping):
        return shrink({key: item for key, item in value.items() if not _names_dropped_layer(key)})
    if name == "mrope_section":
        return [4, 2, 2]
    if isinstance(value, list) and length is not None and len(value) == length:
        return _representatives(value)
    if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
        return [_smaller(name, item, None) for item in value]
    if isinstance(value, float) and DROPOUT.fullmatch(name):
        return 0.0
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if name.endswith(("_id", "_token_index")):
        return value if value < FIRST_SPECIAL else FIRST_SPECIAL + value % (VOCABULARY - FIRST_SPECIAL)
    return next((min(value, size) for pattern, size in SIZES_BY_NAME if pattern.fullmatch(name)), value)


def _names_dropped_layer(key: Any) -> bool:
    return str(key).isdigit() and int(key) >= NUM_LAYERS


def _representatives(kinds: list[Any]) -> list[Any]:
    """Return the last ``NUM_LAYERS`` kinds of a per-layer list: dense layers come first in most."""
    distinct = list({str(kind): kind for kind in kinds}.values())
    return (distinct * NUM_LAYERS)[-NUM_LAYERS:]
