"""What a layout adds to the memory of a step from moment to moment: gathered parameters, and gradients.

Shape legend: M moments.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from moe_plugin.apps.plan.timeline import Kind, Mark, Timeline


class _Curve:
    """Bytes over the moments of a timeline, added up piece by piece."""

    def __init__(self, moments: int) -> None:
        self._changes = torch.zeros(moments + 2, dtype=torch.int64)

    def add(self, size: int, start: int, end: int) -> None:
        """Add bytes that are alive at the moments `start` to `end`, both included."""
        self._changes[start] += size
        self._changes[min(end + 1, len(self._changes) - 1)] -= size

    def values(self) -> Tensor:
        """Return bytes at each moment; int64."""
        return self._changes.cumsum(0)[:-2]


def kept_gradients(timeline: Timeline, units: set[int]) -> Tensor:
    """Return the bytes of gradients that are kept from when they are made until the optimizer's step.

    Args:
        timeline: With marks of the units.
        units: The units whose gradients are kept.
    """
    curve = _Curve(len(timeline.activations_M))
    for mark in timeline.marks:
        if mark.kind == "gradient" and mark.unit in units:
            curve.add(mark.size, mark.moment, len(timeline.activations_M))
    return curve.values()


def sharded_gradients(timeline: Timeline, shards: Sequence[int]) -> Tensor:
    """Return the bytes of the shards of gradients that each unit leaves when its backward ends.

    Args:
        timeline: With marks of the units.
        shards: Bytes of the shard of each unit.
    """
    curve = _Curve(len(timeline.activations_M))
    for mark in timeline.marks:
        if mark.kind == "backward_end":
            curve.add(shards[mark.unit], mark.moment, len(timeline.activations_M))
    return curve.values()


def fsdp_buffers(
    timeline: Timeline,
    gathered: Sequence[int],
    *,
    root: int = 0,
    copies: int = 0,
    by_width: Collection[int] = (),
) -> Tensor:
    """Return the bytes that FSDP2 holds in addition to the shards.

    Parameters are gathered into one buffer and copied out of it. In the forward the buffer is kept until the next unit
    has its own; in the backward a unit's buffer is filled while the unit before it runs. Gradients are whole until
    their unit's backward ends; then they are copied into the input of the reduce-scatter, kept until the next one.

    Args:
        timeline: With marks of the units.
        gathered: Bytes that the all-gather of each unit returns; 0 for units that are not sharded.
        root: The unit that stays gathered between forward and backward.
        copies: Further copies that the backend makes while it gathers: 1 for gloo, 0 for NCCL.
        by_width: Units whose second dimension is split, which takes one more copy.
    """
    marks = [mark for mark in timeline.marks if gathered[mark.unit]]
    moment = defaultdict(lambda: len(timeline.activations_M))  # A unit without gradients has no end.
    moment.update({(mark.kind, mark.unit): mark.moment for mark in marks})
    curve = _Curve(len(timeline.activations_M))
    _add_forward(curve, marks, gathered, moment, root)
    _add_backward(curve, [mark for mark in marks if mark.unit != root], gathered, moment, copies)
    _add_gradients(curve, marks, gathered, moment, by_width)
    return curve.values()


_Moments = Mapping[tuple[Kind, int], int]


def _add_forward(
    curve: _Curve, marks: Sequence[Mark], gathered: Sequence[int], moment: _Moments, root: int
) -> None:
    forwards = [mark.unit for mark in marks if mark.kind == "forward"]
    for unit, following in zip(forwards, [*forwards[1:], None], strict=True):
        start, end = moment["forward", unit], moment["forward_end", unit]
        curve.add(gathered[unit], start, moment["backward_end", unit] - 1 if unit == root else end)
        curve.add(gathered[unit], start, end if following is None else moment["forward", following])


def _add_backward(
    curve: _Curve, marks: Sequence[Mark], gathered: Sequence[int], moment: _Moments, copies: int
) -> None:
    backwards = [mark.unit for mark in marks if mark.kind == "backward"]
    for unit, before in zip(backwards, [None, *backwards[:-1]], strict=True):
        start = moment["backward", unit]
        asked = start if before is None else moment["backward", before] + 1
        curve.add(gathered[unit] * (1 + copies), asked, start)
        curve.add(gathered[unit], start, moment["backward_end", unit] - 1)


def _add_gradients(
    curve: _Curve,
    marks: Sequence[Mark],
    gathered: Sequence[int],
    moment: _Moments,
    by_width: Collection[int],
) -> None:
    for mark in marks:
        if mark.kind == "gradient":
            curve.add(mark.size, mark.moment, moment["backward_end", mark.unit])
    ends = [mark for mark in marks if mark.kind == "backward_end"]
    for mark, following in zip(ends, [*ends[1:], None], strict=True):
        size = gathered[mark.unit]
        curve.add(size, mark.moment, mark.moment if following is None else following.moment - 1)
        if mark.unit in by_width:
            curve.add(size, mark.moment, mark.moment)
