"""How many of its best experts a token keeps.

A cut gives for each of a token's experts, best first, the level from which on it is used. The level is one number per
router.

Shape legend: T tokens, K experts selected per token, at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor


class Cut(Protocol):
    """What a dynamic router needs to know about its cut."""

    start: ClassVar[float]
    """The level before the first step."""

    def needs(self, shares_TK: Tensor, biased_TK: Tensor) -> Tensor:
        """Return the level from which on each expert is used, rising along K; fp32.

        Args:
            shares_TK: The share of each expert in its token's scores over all experts; fp32, best expert first.
            biased_TK: Score plus selection bias; fp32.
        """
        ...


@dataclass(frozen=True)
class TopP:
    """As many experts as hold the share p of the scores: arXiv 2403.07652, section 3.2; p is the level."""

    start: ClassVar[float] = 0.5

    def needs(self, shares_TK: Tensor, biased_TK: Tensor) -> Tensor:
        """Return the share of the experts before: one more is used while it does not suffice, see `Cut.needs`."""
        return shares_TK.cumsum(-1) - shares_TK


@dataclass(frozen=True)
class Threshold:
    """Every expert whose score exceeds its threshold, up to the largest number: arXiv 2603.11535.

    Expert e has the threshold ``-level - bias_e``. So tokens do not compete, and routing is causal: a token's experts
    do not depend on other tokens of the batch. The biases hold the load of each expert, the level that of all.
    """

    start: ClassVar[float] = 0.0

    def needs(self, shares_TK: Tensor, biased_TK: Tensor) -> Tensor:
        """Return the negative biased score, see `Cut.needs`."""
        return -biased_TK
