"""When which bytes are alive in a training step.

Shape legend: M moments, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

Kind = Literal["forward", "forward_end", "backward", "gradient", "backward_end"]


class Mark(NamedTuple):
    """Something that layouts act on.

    Attributes:
        moment: Index into the timeline.
        kind: A unit's forward or backward begins or ends, or the gradient of one of its parameters is made.
        unit: Index of the unit.
        size: Bytes of the gradient.
    """

    moment: int
    kind: Kind
    unit: int
    size: int = 0


@dataclass(frozen=True)
class Timeline:
    """A forward and backward of one micro-batch.

    Attributes:
        activations_M: Bytes alive at each moment, except parameters, buffers and gradients of parameters; int64.
        logits_M: The part of them that was made as wide as the vocabulary: logits, their logarithm of softmax, their
            gradient; int64.
        marks: What happened to the units.
    """

    activations_M: Tensor
    logits_M: Tensor
    marks: Sequence[Mark]

    def at(self, other: Timeline, position: float) -> Timeline:
        """Return the timeline on the line through this one and another.

        Bytes are affine in the number of sequences and in the rows that experts receive.

        Args:
            other: A timeline of the same moments.
            position: Place on the line: 0 is this timeline, 1 the other.
        """
        assert [mark[:3] for mark in self.marks] == [mark[:3] for mark in other.marks]
        activations_M = _line(self.activations_M, other.activations_M, position)
        return Timeline(activations_M, _line(self.logits_M, other.logits_M, position), self.marks)


def _line(here_M: Tensor, there_M: Tensor, position: float) -> Tensor:
    return here_M + (position * (there_M - here_M).double()).round().long()
