"""A whole training step: of `small`, and of a model with a billion parameters; ours, and transformers' Qwen3-MoE.

Same weights, batches, optimizer (fused AdamW) and clipping. A loss that is not that of fp32 within the tolerance is a
failure. MFU is the operations of forward and backward, without recomputation, over the card's peak in bf16.

Shape legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.gpu.line import Figures, Line
from benchmarks.gpu.memory import peak_mib
from benchmarks.gpu.place import Place
from benchmarks.gpu.timing import median_ms, microseconds_per_call
from benchmarks.gpu.waits import waits_of
from benchmarks.models import billion_model, small_model
from moe_plugin import balance_
from moe_plugin.apps.models import AdamWWarmupCosine, LanguageModel
from moe_plugin.apps.models.clipping import clip_gradients_
from moe_plugin.apps.models.size import measure
from moe_plugin.attach.balanced_model import BalancedModel
from moe_plugin.experts import ExpertShape
from moe_plugin.routing import Router, SoftmaxBeforeTopK
from moe_plugin.sharding import find_layers

TOLERANCE = 0.02
"""How far a loss in bf16 may be from the same in fp32, in nats."""
COMPARED = 2
"""Sequences of the batch whose loss is computed in fp32."""
PRECISIONS = ("bf16-mixed", "bf16 weights")
Logits = Callable[[Tensor], Tensor]


class Workload(NamedTuple):
    """A model and its batch: what builds the model, and the sequences of a step."""

    build: Callable[..., LanguageModel]
    sequences: int


MODELS = {"small": Workload(small_model, 32), "1B": Workload(billion_model, 16)}
DRY_SIZES = {
    "dim": 16,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 256,
    "context_length": 16,
    "experts": ExpertShape(num_experts=8, top_k=2, hidden_dim=16),
}


def lines(place: Place) -> Iterator[Line]:
    """Yield ours with and without balancing and compiled, and the peer, for each model and precision."""
    for model in MODELS:
        for precision in PRECISIONS:
            title = f"{model}, {precision}"
            yield Line(f"{title}: ours", partial(ours, place, model, precision))
            yield Line(f"{title}: transformers", partial(peers, place, model, precision), ("transformers",))
        title = f"{model}, {PRECISIONS[0]}"
        measure = partial(ours, place, model, PRECISIONS[0])
        yield Line(f"{title}: ours, balanced", partial(measure, balanced=True))
        yield Line(f"{title}: ours, balanced, compiled", partial(measure, balanced=True, compiled=True))


def model_of(place: Place, name: str) -> LanguageModel:
    """Return a model with softmax scores and normalised gate weights, as Qwen3's.

    Args:
        place: Where.
        name: Its key in `MODELS`.
    """
    router = partial(Router, score=SoftmaxBeforeTopK(), normalize=True)
    return MODELS[name].build(router=router, **place.size({}, DRY_SIZES))


@lru_cache(maxsize=1)
def exact(place: Place, name: str) -> tuple[Tensor, float]:
    """Return a batch, and the loss of its first sequences on the CPU in fp32: other kernels than those measured.

    Args:
        place: Where the batch and the weights are drawn, as all sides do it.
        name: The model's key in `MODELS`.
    """
    with place.device:
        model = model_of(place, name)
        size = place.size(MODELS[name].sequences, 2), model.context_length + 1
        tokens_BS = torch.randint(0, model.network.embedding.num_embeddings, size)
    with torch.no_grad():
        return tokens_BS, float(loss(model.cpu().forward, False, tokens_BS[:COMPARED].cpu()).mean())


def ours(
    place: Place, name: str, precision: str, *, balanced: bool = False, compiled: bool = False
) -> Figures:
    """Measure our model.

    Args:
        place: Where.
        name: Its key in `MODELS`.
        precision: One of `PRECISIONS`.
        balanced: Whether `balance_` balances it.
        compiled: Whether each of its layers is.
    """
    tokens_BS, _ = exact(place, name)
    with place.device:
        model = model_of(place, name)
    balancer = balance_(model) if balanced else None
    loss_of = prepared(model, model.forward, precision)
    if balanced:
        loss_of(tokens_BS).mean().backward()  # tries and proves each router, which compiled code does not
    for layer in find_layers(model) if compiled else []:
        layer.compile()
    return figures_of(place, name, model, loss_of, balancer)


def peers(place: Place, name: str, precision: str) -> Figures:
    """Measure the same model of transformers; arguments as `ours` has them."""
    from benchmarks.qwen3 import as_qwen3

    exact(place, name)
    with place.device:
        model = as_qwen3(model_of(place, name), "grouped_mm")
    loss_of = prepared(model, lambda tokens_BS: model(input_ids=tokens_BS).logits, precision)
    return figures_of(place, name, model, loss_of, None)


def prepared(model: nn.Module, logits: Logits, precision: str) -> Callable[[Tensor], Tensor]:
    """Return the loss of a model in a precision.

    Args:
        model: Cast if it is to have weights in bf16.
        logits: Its forward.
        precision: One of `PRECISIONS`.
    """
    if precision == "bf16 weights":
        model.bfloat16()
    return partial(loss, logits, precision == "bf16-mixed")


def figures_of(
    place: Place,
    name: str,
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    balancer: BalancedModel | None,
) -> Figures:
    """Return time, tokens per second, MFU, waits, memory, and the distance of the loss from that in fp32.

    Args:
        place: Where.
        name: The model's key in `MODELS`.
        model: The model.
        loss_of: Its loss.
        balancer: What balances it.

    Raises:
        ValueError: The loss is too far from that in fp32.
    """
    tokens_BS, expected = exact(place, name)
    step = partial(training_step(model, loss_of, balancer), tokens_BS)
    error = abs(float(step()[:COMPARED].mean()) - expected)
    if not error <= TOLERANCE:
        raise ValueError(f"the loss must be within {TOLERANCE} of {expected:.4f}, got {error:.4f} off")
    milliseconds = median_ms(place, step)
    tokens_per_second = tokens_BS[:, 1:].numel() / milliseconds * 1e3
    figures = {"ms": milliseconds, "tokens/s": tokens_per_second}
    if (peak := place.peak_tflops) is not None:
        figures["MFU %"] = 1e-10 * tokens_per_second * operations_per_token(place, name) / peak
    figures |= {"waits": waits_of(place, step), "peak MiB": peak_mib(place, step), "loss error": error}
    if balancer is not None:
        figures["update us"] = microseconds_per_call(place, balancer.update, calls=20)
    return figures


def operations_per_token(place: Place, name: str) -> int:
    """Return the floating-point operations of forward and backward.

    Args:
        place: Where.
        name: The model's key in `MODELS`.
    """
    with torch.device("meta"):
        return measure(model_of(place, name)).training_flops_per_token


def training_step(
    model: nn.Module, loss_of: Callable[[Tensor], Tensor], balancer: BalancedModel | None
) -> Callable[[Tensor], Tensor]:
    """Return an optimizer step that never asks the device for a value, and returns the losses.

    Args:
        model: Its parameters are trained.
        loss_of: The loss of tokens.
        balancer: What balances the model.
    """
    # So slow that the model stays what it is, and all sides with it.
    optimizer = AdamWWarmupCosine(learning_rate=1e-6).optimizer(model.parameters(), fused=True)

    def step(tokens_BS: Tensor) -> Tensor:
        losses_BS = loss_of(tokens_BS)
        loss = losses_BS.mean()
        if balancer is not None:
            balancer.reject_if_(~loss.detach().isfinite())
        loss.backward()
        clip_gradients_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if balancer is not None:
            balancer.update()
        return losses_BS.detach()

    return step


def loss(logits: Logits, autocast: bool, tokens_BS: Tensor) -> Tensor:
    """Return the cross-entropy of each next token, (B, S).

    Args:
        logits: A model's forward.
        autocast: Whether it runs under autocast to bf16.
        tokens_BS: Sequences with their last targets.
    """
    with torch.autocast(tokens_BS.device.type, torch.bfloat16, enabled=autocast):
        logits_BSV = logits(tokens_BS[:, :-1])
    targets_BS = tokens_BS[:, 1:]
    logits_TV = logits_BSV.flatten(0, 1).float()
    return functional.cross_entropy(logits_TV, targets_BS.flatten(), reduction="none").view_as(targets_BS)
