"""The memory of a rank at the worst moment of a step.

Shape legend: M moments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass

from torch import Tensor

from moe_plugin.apps.plan.timeline import Timeline


@dataclass(frozen=True)
class RankMemory:
    """Bytes at the moment when a rank holds most.

    Attributes:
        parameters: The rank's parameters, or its shards of them.
        gradients: Their gradients, as far as they are made.
        optimizer: Both of Adam's moments, in the parameters' dtype.
        buffers: What the layout holds for its collectives: gathered parameters, whole gradients, buckets.
        activations: What is kept for the backward, and what operations work on, without the logits.
        logits: Logits, their logarithm of softmax and their gradient.
    """

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(astuple(self))


def at_peak(
    step: Timeline, *, parameters: int, optimizer: int, gradients_M: Tensor, buffers_M: Tensor
) -> RankMemory:
    """Return the memory at the worst moment of a step, from bytes of each part; see `RankMemory`."""
    worst = int((step.activations_M + gradients_M + buffers_M).argmax())
    logits = int(step.logits_M[worst])
    return RankMemory(
        parameters=parameters,
        gradients=int(gradients_M[worst]),
        optimizer=optimizer,
        buffers=int(buffers_M[worst]),
        activations=int(step.activations_M[worst]) - logits,
        logits=logits,
    )


def largest_that_fits(total: Callable[[int], int], limit: int) -> int:
    """Return the largest number whose total is within the limit; 0 if even 1 is too large.

    Args:
        total: Bytes, growing with the number.
        limit: Bytes.
    """
    low, high = 0, 1
    while total(high) <= limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if total(middle) <= limit else (low, middle)
    return low
