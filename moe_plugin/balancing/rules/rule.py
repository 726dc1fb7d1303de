"""What an update rule is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from moe_plugin.balancing.rules.load import Load

Memory = dict[str, Tensor]
"""What a rule keeps of earlier steps at one site, saved in checkpoints. A missing key is zero."""


@runtime_checkable
class Rule(Protocol):
    """A function from the load of one step to a step of the bias.

    A rule that sets ``needs_gaps = True`` also sees how far scores were from being selected; an ``auto_fraction``
    replaces `AUTO_FRACTION` as its automatic rate.
    """

    @property
    def rate(self) -> float | str:
        """Size of a step in score units, or 'auto' for a fraction of the site's score spread."""
        ...

    def step(self, load: Load, rate: float | Tensor, memory: Memory) -> Tensor:
        """Return how far to move the bias.

        All ranks call it with the same numbers, once for all sites that are alike, stacked in a leading dimension. The
        result of a step that must change nothing (a skipped, non-finite or empty one) is discarded, with its memory:
        rules need not look for those.

        Args:
            load: The load of this step.
            rate: The rule's rate in this step: resolved if it is 'auto', times the schedule.
            memory: The rule's memory, stacked like the load. New tensors replace old ones, which are not changed.

        Returns:
            float64 (..., E) with zero mean over the experts, unless the rule is documented otherwise.
        """
        ...
