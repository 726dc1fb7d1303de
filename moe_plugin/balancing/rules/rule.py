"""What an update rule is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from moe_plugin.balancing.rules.load import Load

Memory = dict[str, Tensor]
"""What a rule keeps of earlier steps at one site, saved in checkpoints. A key that is missing stands for zero."""


@runtime_checkable
class Rule(Protocol):
    """Turns the load of one step into a step of the bias.

    A rule that sets ``needs_gaps = True`` also sees how far scores were from being selected; one that sets an
    ``auto_fraction`` has it, instead of `AUTO_FRACTION`, as its automatic rate.
    """

    @property
    def rate(self) -> float | str:
        """Size of a step in score units, or 'auto' for a fraction of the site's score spread."""
        ...

    def step(self, load: Load, rate: float | Tensor, memory: Memory) -> Tensor:
        """Return how far to move the bias.

        It is called by all ranks with the same numbers, and once for all sites that are alike, stacked in a leading
        dimension. What comes of a step that must change nothing (a skipped,
        non-finite or empty one) is thrown away, the memory of it too, so that rules need not look for those.

        Args:
            load: The load of this step.
            rate: The rule's rate in this step: resolved where it is 'auto', times the schedule.
            memory: The rule's memory, stacked like the load. New tensors are put in the place of old ones; none is
                changed.

        Returns:
            float64 (..., E) with zero mean over the experts unless the rule says otherwise.
        """
        ...
