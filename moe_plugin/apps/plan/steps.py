"""Timelines for any number of sequences and any imbalance, from few traces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from moe_plugin.apps.plan.fake_expert_shards import spread_experts_
from moe_plugin.apps.plan.fsdp_units import Unit, modules_of_units, units_of
from moe_plugin.apps.plan.timeline import Timeline
from moe_plugin.apps.plan.trace import trace

# One sequence alone would be laid out otherwise: a dimension of one element has no order.
_SEQUENCES = 2


@dataclass(frozen=True)
class Steps:
    """Steps of a model on one layout, for any micro-batch.

    Attributes:
        units: Units of the model.
        num_experts_apart: How many of them, at the end, are the experts of a layer.
        nothing: The timeline of no sequences.
        balanced: That of two sequences.
        unbalanced: That of two sequences where the rank's experts receive twice their share; None if they are whole.
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
            excess: MaxVio of the rank, where experts are spread.
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
    units, balanced = _trace(build, 0, (_SEQUENCES, length), autocast)
    return Steps(units, 0, _nothing(build, 0, length, autocast, balanced), balanced)


def spread_steps(
    build: Callable[[], nn.Module], length: int, autocast: torch.dtype | None, ranks: int
) -> Steps:
    """Return steps of the model with its experts spread over `ranks` ranks."""
    units, balanced = _trace(build, ranks, (_SEQUENCES, length), autocast)
    _, unbalanced = _trace(build, ranks, (_SEQUENCES, length), autocast, excess=1.0)
    apart = sum(unit.by_width for unit in units)
    return Steps(units, apart, _nothing(build, ranks, length, autocast, balanced), balanced, unbalanced)


def _nothing(
    build: Callable[[], nn.Module],
    ranks: int,
    length: int,
    autocast: torch.dtype | None,
    balanced: Timeline,
) -> Timeline:
    if autocast is None:  # All that is alive belongs to tokens.
        return Timeline(balanced.activations_M * 0, balanced.logits_M * 0, balanced.marks)
    _, more = _trace(build, ranks, (_SEQUENCES + 1, length), autocast)
    return balanced.at(more, -_SEQUENCES)


def _trace(
    build: Callable[[], nn.Module],
    ranks: int,
    shape: tuple[int, int],
    autocast: torch.dtype | None,
    excess: float = 0.0,
) -> tuple[list[Unit], Timeline]:
    model = build()
    experts = spread_experts_(model, ranks, excess) if ranks else []
    modules = modules_of_units(model, experts)
    return units_of(modules, experts), trace(model, shape, modules, autocast=autocast)
