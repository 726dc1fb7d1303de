"""What balancing adds to a training step: to the tiny model's as a whole, and alone compared with the small one's.

Whole: two trainings of the same model on the same batches take turns, one with the callback's default rule, its biases
set back to zero after each update so both route alike, and one without. Equal losses are checked. Such a ratio
shows no less than a percent. Alone: all routers of the small model are called with and without balancing, the update
included; what that takes more is compared with a step of the model, and shows a hundredth of a percent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.models import LENGTH, random_tokens, small_model, tiny_model
from benchmarks.row import Row
from benchmarks.turns import take_turns
from moe_plugin.apps.models import LanguageModel
from moe_plugin.attach.balance import balance_
from moe_plugin.attach.balanced_model import BalancedModel
from moe_plugin.routing import Router


def rows(rounds: int = 60, batch: int = 16) -> Iterator[Row]:
    """Yield both, with `batch` sequences of 256 tokens."""
    yield whole(rounds, batch, "balanced step of tiny", tiny_model, tolerance=0.0)
    yield alone(rounds, batch)


def whole(rounds: int, batch: int, name: str, make: Callable[[], LanguageModel], *, tolerance: float) -> Row:
    """Return a whole step with balancing over one without."""
    sides = {"balanced": training_step(make(), True), "plain": training_step(make(), False)}
    turns = take_turns(
        sides,
        rounds,
        fresh=lambda: random_tokens(batch),
        agree=lambda loss: max(loss.values()) - min(loss.values()) <= tolerance,
    )
    return turns.row(name, "balanced", "plain", note="the same step without balancing")


def alone(rounds: int, batch: int) -> Row:
    """Return routing and update with balancing, less routing without, over a step of the small model."""
    sides = {"balanced": routing(small_model(), True), "plain": routing(small_model(), False)}
    turns = take_turns(sides, rounds, fresh=lambda: torch.randn(batch * LENGTH, 384))
    extra_ms = 1e-3 * turns.extra_microseconds("balanced", "plain")
    step = training_step(small_model(), False)
    step_ms = take_turns({"step": step}, 5, fresh=lambda: random_tokens(batch), warm_up=1).milliseconds(
        "step"
    )
    note = f"fp32; {extra_ms:.2f} ms more"
    return Row(
        "balancing, small",
        100 * extra_ms / step_ms,
        "a whole step",
        "%",
        goal=0.1,
        note=note,
        milliseconds=step_ms,
    )


def routing(model: LanguageModel, balanced: bool) -> Callable[[torch.Tensor], None]:
    """Return a call of all routers of a model on the same hidden states, with the update of all biases."""
    balancer = balance_(model) if balanced else None
    routers = [module for module in model.modules() if isinstance(module, Router)]

    def route(x_TD: torch.Tensor) -> None:
        for router in routers:
            router(x_TD)
        if balancer is not None:
            update_(balancer)

    return route


def training_step(model: LanguageModel, balanced: bool) -> Callable[[torch.Tensor], float]:
    """Return an optimizer step, with or without balancing."""
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
            update_(balancer)
        return loss.item()

    return step


def update_(balancer: BalancedModel) -> None:
    """Move all biases, and back to zero, so routing stays as in a model without balancing."""
    balancer.update()
    for site in balancer.values():
        site.bias.zero_()
