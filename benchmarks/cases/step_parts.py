"""Where the step of the small model takes its time: each part alone, and the same part of transformers' Qwen3-MoE.

Forward and backward of one layer's part, times its number in the model; clipping and optimizer once. The peer computes
experts by `grouped_mm`, and attention by torch's fused kernel in fp32 and by products and a softmax (`eager`) in bf16,
whichever is faster on a CPU. Precisions are those of `train_step`.

Shape legend: B batch, S sequence, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.cases.train_step import PRECISIONS, softmax_model
from benchmarks.models import LENGTH
from benchmarks.qwen3 import as_qwen3
from benchmarks.row import Row
from benchmarks.turns import take_turns
from moe_plugin.apps.models import AdamWWarmupCosine, LanguageModel
from moe_plugin.apps.models.attention import rotary_table

PEER = "grouped_mm"


class Part(NamedTuple):
    """A part of the model: how often it is there, and our pass and the peer's."""

    name: str
    count: int
    ours: Callable[[], object]
    peer: Callable[[], object]


def rows(rounds: int = 5, batch: int = 2) -> Iterator[Row]:
    """Yield each part in each precision; `batch` is sequences of 256 tokens."""
    for precision in PRECISIONS:
        attention = "sdpa" if precision == "fp32" else "eager"
        ours, peer = softmax_model(), as_qwen3(softmax_model(), PEER, attention)
        if precision == "bf16 weights":
            for model in (ours, peer):
                model.bfloat16()
        for part in (*layer_parts(ours, peer, batch, precision), *update_parts(ours, peer)):
            yield beside(part, precision, rounds)


def beside(part: Part, precision: str, rounds: int) -> Row:
    """Return one part over the peer's, with the times of all its kind in the model."""
    sides = {"ours": lambda _: part.ours(), PEER: lambda _: part.peer()}
    turns = take_turns(sides, rounds, warm_up=2)
    ours_ms, peer_ms = (part.count * turns.milliseconds(side) for side in ("ours", PEER))
    row = turns.row(f"{part.name}, {precision}", "ours", PEER, note=f"{peer_ms:.0f} ms; {part.count} of them")
    return replace(row, milliseconds=ours_ms)


def layer_parts(ours: LanguageModel, peer: Any, batch: int, precision: str) -> Iterator[Part]:
    """Yield norms, attention, blocks of experts, the dense layer and the head."""
    network = ours.network
    layers, one, other = len(network.layers), network.layers[-1], peer.model.layers[-1]
    head_dim, dim = network.head_dim, network.embedding.embedding_dim
    x_BSD = torch.randn(batch, LENGTH, dim, dtype=next(ours.parameters()).dtype, requires_grad=True)
    rotary = rotary_table(LENGTH, head_dim, x_BSD.device)
    theirs = {
        "position_embeddings": peer.model.rotary_emb(x_BSD, torch.arange(LENGTH)[None]),
        "attention_mask": None if peer.config._attn_implementation == "sdpa" else future_of(x_BSD),
    }
    of = partial(forward_and_backward, x_BSD=x_BSD, precision=precision)
    yield Part("norms", 2 * layers + 1, of(one.attention_norm), of(other.input_layernorm))
    yield Part("attention", layers, of(one.attention, rotary=rotary), of(other.self_attn, **theirs))
    yield Part("blocks of experts", layers - 1, of(one.feed_forward), of(other.mlp))
    yield Part("dense layer", 1, of(network.layers[0].feed_forward), of(peer.model.layers[0].mlp))
    yield Part("head", 1, of(network.head), of(peer.lm_head))


def future_of(x_BSD: Tensor) -> Tensor:
    """Return what `eager` adds to scores to hide later positions: (1, 1, S, S)."""
    length = x_BSD.shape[1]
    return x_BSD.new_full((1, 1, length, length), torch.finfo(x_BSD.dtype).min).triu(1)


def forward_and_backward(module: Any, *, x_BSD: Tensor, precision: str, **more: Any) -> Callable[[], None]:
    """Return both passes of a module, with the gradients of its input and parameters."""

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16 autocast"):
            y = module(x_BSD, **more)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(torch.ones_like(y))
        x_BSD.grad = None
        module.zero_grad()

    return run


def update_parts(ours: nn.Module, peer: nn.Module) -> Iterator[Part]:
    """Yield clipping and the optimizer."""
    optimizers = []
    for model in (ours, peer):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizers.append(AdamWWarmupCosine(learning_rate=1e-6).optimizer(model.parameters(), fused=True))
    clips = (partial(nn.utils.clip_grad_norm_, list(model.parameters()), 1.0) for model in (ours, peer))
    yield Part("clipping", 1, *clips)
    yield Part("optimizer", 1, *(optimizer.step for optimizer in optimizers))
