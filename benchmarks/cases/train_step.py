"""A whole training step of the small model compared with the same model built from transformers' Qwen3-MoE.

Same weights, parameters, operations, batches, optimizer (fused AdamW) and clipping; equal losses are checked in every
round, and each side has its own process. transformers computes experts by `eager` and `grouped_mm`, attention by
`sdpa` and `eager`, and the fastest of the four is the peer. `batched_mm` is left out: it copies an expert's weights for
every token, 1.6 GB a layer here. Precisions: fp32, bf16 by autocast over fp32 weights, and bf16 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.apart import apart
from benchmarks.memory import peak_mib
from benchmarks.models import random_tokens, small_model
from benchmarks.qwen3 import as_qwen3
from benchmarks.row import Row
from benchmarks.turns import take_turns
from moe_plugin.apps.models import AdamWWarmupCosine, LanguageModel
from moe_plugin.routing import Router, SoftmaxBeforeTopK

IMPLEMENTATIONS = ("eager", "grouped_mm")
ATTENTIONS = ("sdpa", "eager")
PRECISIONS = ("fp32", "bf16 autocast", "bf16 weights")
TOLERANCE = {"fp32": 1e-3, "bf16 autocast": 0.02, "bf16 weights": 0.02}
"""In fp32 sides agree to 1e-6 until a token near a tie goes to another expert, which moves the loss by about 1e-4."""
WARM_UP = {"fp32": 2, "bf16 autocast": 20, "bf16 weights": 20}
"""In bf16 a model of this size takes this many steps until it meets few numbers of rows without a kernel."""
Step = Callable[[Tensor], float]
Logits = Callable[[Tensor], Tensor]


def rows(rounds: int = 8, batch: int = 4, growth_rounds: int = 4) -> Iterator[Row]:
    """Yield our step over the peer's in each precision, then by number of layers; `batch` is sequences."""
    for precision in PRECISIONS:
        yield beside_transformers(precision, rounds, batch)
    yield from by_layers(growth_rounds, batch)


def beside_transformers(precision: str, rounds: int, batch: int) -> Row:
    """Return the step in one precision."""
    sides = {"ours": partial(our_step, precision)} | {
        f"{experts}, {attention}": partial(peer_step, experts, attention, precision)
        for experts, attention in product(IMPLEMENTATIONS, ATTENTIONS)
    }
    goal = 0.75 if precision.startswith("bf16") else None
    return over_best_peer("step of small", sides, precision, rounds, batch, goal=goal)


def as_it_is(logits: Logits) -> Logits:
    """Return the same forward, in contrast to `torch.compile`."""
    return logits


def our_step(precision: str, prepare: Callable[[Logits], Logits] = as_it_is) -> Step:
    """Return the step of our model, its forward prepared by `prepare`."""
    model = softmax_model()
    return training_step(model, prepare(model.forward), precision)


def peer_step(
    experts: str, attention: str, precision: str, prepare: Callable[[Logits], Logits] = as_it_is
) -> Step:
    """Return the step of the same model of transformers."""
    peer = as_qwen3(softmax_model(), experts, attention)
    return training_step(peer, prepare(partial(logits_of, peer)), precision)


def over_best_peer(
    title: str,
    sides: Mapping[str, Callable[[], Step]],
    precision: str,
    rounds: int,
    batch: int,
    goal: float | None = None,
) -> Row:
    """Return the first side over the fastest of the others, which are settings of transformers."""
    mine, *peers = sides
    tokens = random_tokens(batch)
    with apart(sides) as running:

        def processor_time() -> float:
            return sum(side.seconds for side in running.values())

        turns = take_turns(
            running,
            rounds,
            fresh=partial(random_tokens, batch),
            agree=partial(are_close, tolerance=TOLERANCE[precision]),
            warm_up=WARM_UP[precision],
            # With several threads processor time says little, and the clock of this process is as good.
            clock=processor_time if torch.get_num_threads() == 1 else None,
        )
        best = min(peers, key=turns.milliseconds)
        memory = {name: running[name].do(peak_of, tokens) for name in (mine, best)}
    return turns.row(
        f"{title}, {precision}",
        mine,
        best,
        goal=goal,
        memory_mib=memory[mine],
        note=f"transformers, best of {len(peers)} settings; {memory[best]:.0f} MiB",
    )


def peak_of(step: Step, tokens_BS: Tensor) -> float:
    """Return the peak memory of a step, in MiB."""
    return peak_mib(partial(step, tokens_BS))


def by_layers(rounds: int, batch: int) -> Iterator[Row]:
    """Yield what one more layer costs in a deep model over its cost in a shallow one."""
    models = {layers: softmax_model(num_layers=layers, num_dense=0) for layers in (2, 4, 8, 16)}
    sides = {str(n): training_step(model, model.forward, "fp32") for n, model in models.items()}
    turns = take_turns(sides, rounds, fresh=lambda: random_tokens(batch), warm_up=1)
    for layers in (4, 8, 16):
        low, median, high = turns.ratio(str(layers), str(layers // 2))
        note = "half as many layers; 2 would be linear without embedding and head"
        yield Row(
            f"{layers} layers, fp32", median, f"{layers // 2} layers", low=low, high=high, goal=2.1, note=note
        )


def softmax_model(**changes: int) -> LanguageModel:
    """Return the small model with the router of Qwen3."""
    return small_model(router=partial(Router, score=SoftmaxBeforeTopK(), normalize=True), **changes)


def training_step(model: nn.Module, logits: Logits, precision: str) -> Step:
    """Return an optimizer step."""
    if precision == "bf16 weights":
        model.bfloat16()
    # So slow that rounding does not make the sides differ over the rounds.
    optimizer = AdamWWarmupCosine(learning_rate=1e-6).optimizer(model.parameters(), fused=True)

    def step(tokens: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16 autocast" else nullcontext():
            logits_BSV = logits(tokens[:, :-1])
        loss = functional.cross_entropy(logits_BSV.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def logits_of(peer: nn.Module, tokens_BS: Tensor) -> Tensor:
    """Return the logits of a model of transformers."""
    return peer(input_ids=tokens_BS).logits


def are_close(losses: Mapping[str, float], tolerance: float) -> bool:
    """Return whether all sides train the same function."""
    return max(losses.values()) - min(losses.values()) < tolerance
