"""Our language model built once more from transformers' Qwen3-MoE, with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from moe_plugin.apps.models import LanguageModel
from moe_plugin.apps.models.size import measure
from moe_plugin.apps.models.transformer import TransformerLayer


def as_qwen3(
    ours: LanguageModel, experts_implementation: str, attention: str = "sdpa"
) -> Qwen3MoeForCausalLM:
    """Return the same function as `ours`, a model with softmax scores and normalised gate weights.

    Qwen3's norms of queries and keys, which ours does not have, are left out: they would only cost the peer time.

    Args:
        ours: Where the weights come from.
        experts_implementation: How transformers computes experts: eager, batched_mm or grouped_mm.
        attention: And attention: sdpa, torch's fused kernel, or eager, two products and a softmax.
    """
    network = ours.network
    peer = Qwen3MoeForCausalLM(_config(ours))
    peer.set_experts_implementation(experts_implementation)
    peer.set_attn_implementation(attention)
    with torch.no_grad():
        peer.model.embed_tokens.weight.copy_(network.embedding.weight)
        peer.model.norm.weight.copy_(network.norm.weight)
        assert network.head is not None
        peer.lm_head.weight.copy_(network.head.weight)
        for layer, theirs in zip(network.layers, peer.model.layers, strict=True):
            assert isinstance(layer, TransformerLayer)
            _copy_layer_(theirs, layer)
    check_same_size(ours, peer)
    return peer


def qwen3_block(
    dim: int, experts: int, top_k: int, hidden: int, experts_implementation: str
) -> Qwen3MoeSparseMoeBlock:
    """Return Qwen3-MoE's block alone, with random weights that keep the scale of its input."""
    config = Qwen3MoeConfig(
        hidden_size=dim,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=hidden,
        norm_topk_prob=True,
    )
    config._experts_implementation = experts_implementation
    block = Qwen3MoeSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return block


def check_same_size(ours: LanguageModel, peer: nn.Module) -> None:
    """Compare parameters and operations; both counts are exact."""
    one, other = measure(ours), measure(peer, context_length=ours.context_length)
    for number in ("total_parameters", "active_parameters", "forward_flops_per_token"):
        assert getattr(one, number) == getattr(other, number), (number, one, other)


def _config(ours: LanguageModel) -> Qwen3MoeConfig:
    network = ours.network
    first: Any = network.layers[0]
    block: Any = network.layers[-1].feed_forward
    dense = [
        index for index, layer in enumerate(network.layers) if not hasattr(layer.feed_forward, "experts")
    ]
    epsilon = torch.finfo(torch.float32).eps  # that of nn.RMSNorm
    return Qwen3MoeConfig(
        vocab_size=network.embedding.num_embeddings,
        hidden_size=network.embedding.embedding_dim,
        num_hidden_layers=len(network.layers),
        num_attention_heads=first.attention.num_heads,
        num_key_value_heads=first.attention.num_heads,
        head_dim=first.attention.head_dim,  # pyright: ignore[reportCallIssue]
        intermediate_size=first.feed_forward.down.in_features if dense else 1,
        mlp_only_layers=dense,
        num_experts=block.router.num_experts,
        num_experts_per_tok=block.router.top_k,
        moe_intermediate_size=block.experts.down.shape[1],
        norm_topk_prob=True,
        max_position_embeddings=ours.context_length,
        rms_norm_eps=epsilon,
        tie_word_embeddings=False,
        use_cache=False,
    )


def _copy_layer_(theirs: Any, ours: TransformerLayer) -> None:
    q, k, v = ours.attention.qkv.weight.chunk(3)
    attention = theirs.self_attn
    attention.q_norm = attention.k_norm = nn.Identity()
    for target, source in ((attention.q_proj, q), (attention.k_proj, k), (attention.v_proj, v)):
        target.weight.copy_(source)
    attention.o_proj.weight.copy_(ours.attention.out.weight)
    theirs.input_layernorm.weight.copy_(ours.attention_norm.weight)
    theirs.post_attention_layernorm.weight.copy_(ours.feed_forward_norm.weight)
    block: Any = ours.feed_forward
    if hasattr(block, "experts"):
        theirs.mlp.gate.weight.copy_(block.router.weight)
        theirs.mlp.experts.gate_up_proj.copy_(_transposed(block.experts.gate_up))
        theirs.mlp.experts.down_proj.copy_(_transposed(block.experts.down))
    else:
        gate, up = block.gate_up.weight.chunk(2)
        theirs.mlp.gate_proj.weight.copy_(gate)
        theirs.mlp.up_proj.weight.copy_(up)
        theirs.mlp.down_proj.weight.copy_(block.down.weight)


def _transposed(weights_EIO: Tensor) -> Tensor:
    return weights_EIO.transpose(1, 2)
