"""Timelines for any number of sequences and any imbalance, from a few traces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from moe_plugin.apps.plan.fake_expert_shards import spread_experts_
from moe_plugin.apps.plan.fsdp_units import Unit, modules_of_units, units_of
from moe_plugin.apps.plan.timeline import Timeline
from moe_plugin.apps.plan.trace import trace

# One sequence would be laid out in another way: a dimension of one element has no order.
_SEQUENCES = 2


@dataclass(frozen=True)
class Steps:
    """Steps of a model on one layout, for any micro-batch.

    Attributes:
        units: Units of the model.
        num_experts_apart: How many of them, at the end, are the experts of a layer.
        nothing: The timeline of no sequences.
        balanced: That of two sequences.
        unbalanced: That of two sequences when the rank's experts receive twice their share; None if they are whole.
    """

    units: list[Unit]
    num_experts_apart: int
    nothing: Timeline
    balanced: Timeline
    unbalanced: Timeline | None = None

    def step(self, sequences: int, excess: float = 0.0) -> Timeline:
        """Return the timeline of a micro-batch.

        Args:
            sequences: Sequences.
            excess: MaxVio of the rank, if experts are spread.
        """
        both = self.balanced if self.unbalanced is None else self.balanced.at(self.unbalanced, excess)
        return self.nothing.at(both, sequences / _SEQUENCES)


def whole_steps(build: Callable[[], nn.Module], length: int, autocast: torch.dtype | None) -> Steps:
    """Return steps of the model with all experts on each rank.

    Args:
        build: Makes the model on the meta device; called once per trace.
        length: Tokens of a sequence.
        autocast: Dtype of the autocast that it trains under.
    """
    traced = partial(_trace, build, length, autocast)
    units, balanced = traced()
    return Steps(units, 0, _nothing(traced, balanced, autocast), balanced)


def spread_steps(
    build: Callable[[], nn.Module], length: int, autocast: torch.dtype | None, ranks: int
) -> Steps:
    """Return steps of the model with its experts spread over `ranks` ranks; else as `whole_steps`."""
    traced = partial(_trace, build, length, autocast, ranks=ranks)
    units, balanced = traced()
    apart = sum(unit.by_width for unit in units)
    return Steps(units, apart, _nothing(traced, balanced, autocast), balanced, traced(excess=1.0)[1])


def _nothing(
    traced: Callable[..., tuple[list[Unit], Timeline]], balanced: Timeline, autocast: torch.dtype | None
) -> Timeline:
    if autocast is None:  # All that is alive belongs to tokens.
        return Timeline(balanced.activations_M * 0, balanced.logits_M * 0, balanced.marks)
    return balanced.at(traced(sequences=_SEQUENCES + 1)[1], -_SEQUENCES)


def _trace(
    build: Callable[[], nn.Module],
    length: int,
    autocast: torch.dtype | None,
    ranks: int = 0,
    sequences: int = _SEQUENCES,
    excess: float = 0.0,
) -> tuple[list[Unit], Timeline]:
    model = build()
    experts = spread_experts_(model, ranks, excess) if ranks else []
    modules = modules_of_units(model, experts)
    return units_of(modules, experts), trace(model, (sequences, length), modules, autocast=autocast)
