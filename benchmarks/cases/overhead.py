"""What balancing adds to a whole training step of the tiny model.

Two trainings of the same model on the same batches take turns: one with the callback's default rule, its biases set
back to zero after each update so that both route alike, and one without. Equal losses are checked. The cost is all that
the callback does in a step: the balanced forward, the counting, the measuring of the score spread, the look at the
loss, and the update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.models import random_tokens, tiny_model
from benchmarks.row import Row
from benchmarks.turns import take_turns
from moe_plugin.balance import balance_
from moe_plugin.models import LanguageModel


def rows(rounds: int = 60, batch: int = 16) -> Iterator[Row]:
    """A step with balancing over one without; `batch` is sequences of 256 tokens."""
    sides = {"balanced": training_step(tiny_model(), True), "plain": training_step(tiny_model(), False)}
    turns = take_turns(
        sides, rounds, fresh=lambda: random_tokens(batch), agree=lambda loss: len(set(loss.values())) == 1
    )
    yield turns.row("balanced step", "balanced", "plain", note="the same step without balancing")


def training_step(model: LanguageModel, balanced: bool) -> Callable[[torch.Tensor], float]:
    """A whole optimizer step, with or without balancing."""
    balancer = balance_(model) if balanced else None
    optimizer = model.optimizer.optimizer(model.parameters(), fused=True)

    def step(tokens: torch.Tensor) -> float:
        loss, _ = model._losses({"tokens": tokens})
        if balancer is not None:
            balancer.reject_if_(~loss.detach().isfinite().all())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if balancer is not None:
            balancer.update()
            for site in balancer.values():
                site.bias.zero_()
        return loss.item()

    return step
