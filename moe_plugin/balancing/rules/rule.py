"""What an update rule is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Rule(Protocol):
    """Turns the load of one step into a direction for the bias."""

    @property
    def rate(self) -> float | str:
        """Length of a step in score units, or 'auto' for a fraction of the site's score spread."""
        ...

    def direction(self, counts_E: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The way to move the bias, before the rate.

        Args:
            counts_E: Tokens per expert of this step over all ranks; int64 (..., E). All zero for a step that
                must change nothing: a skipped, non-finite or empty one.
            state: The rule's own memory for this site, changed in place; tensors only, saved in checkpoints.

        Returns:
            fp32 (..., E) with zero mean over the experts unless the rule says otherwise.
        """
        ...
