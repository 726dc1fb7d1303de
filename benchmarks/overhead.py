"""What the balancing callback adds to a training step of the tiny model, paired in one run.

Two trainings of the same model on the same batches take turns, step by step in shuffled order: one with
the callback's default rule, its biases set back to zero after each update so that both route alike, and one without.
Equal losses are checked. The cost is all that the callback does in a step: the balanced forward, the counting, the
measuring of the score spread, the look at the loss, and the update.

    python benchmarks/overhead.py [--rounds 60] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from moe_plugin.balance import balance_
from moe_plugin.experts import ExpertShape
from moe_plugin.models import LanguageModel
from moe_plugin.routing import Router, Sigmoid

VOCABULARY, LENGTH = 256, 256


def tiny_model() -> LanguageModel:
    """The model of conf/model/tiny.yaml with conf/experts/16.yaml."""
    torch.manual_seed(0)
    return LanguageModel(
        vocab_size=VOCABULARY,
        context_length=LENGTH,
        dim=128,
        num_layers=4,
        num_heads=4,
        router=partial(Router, score=Sigmoid(), normalize=True),
        experts=ExpertShape(num_experts=16, top_k=2, hidden_dim=128),
    )


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


def measure(rounds: int, batch: int) -> dict[str, float]:
    """Process seconds of a step with and without balancing, medians over paired rounds."""
    steps = {name: training_step(tiny_model(), name == "balanced") for name in ("plain", "balanced")}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 3):
        tokens = torch.randint(0, VOCABULARY, (batch, LENGTH + 1))
        losses = {}
        for name in random.sample(sorted(steps), len(steps)):
            start = time.process_time()
            losses[name] = steps[name](tokens)
            if turn >= 3:  # the first rounds warm up
                seconds[name].append(time.process_time() - start)
        assert losses["plain"] == losses["balanced"], losses
    ratios = [b / p for b, p in zip(seconds["balanced"], seconds["plain"], strict=True)]
    medians = {f"{name}_ms": 1e3 * statistics.median(values) for name, values in seconds.items()}
    quartiles = statistics.quantiles(ratios, n=4)
    return medians | {"ratio": quartiles[1], "ratio_q1": quartiles[0], "ratio_q3": quartiles[2]}


def main() -> None:
    """Prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16, help="sequences of 256 tokens")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    random.seed(0)
    result = measure(options.rounds, options.batch)
    machine = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__, **vars(options)}
    print(json.dumps({key: round(value, 4) for key, value in result.items()} | machine))


if __name__ == "__main__":
    main()
