"""What a case reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One measured number and its peer.

    Attributes:
        name: What is measured, and at which size.
        value: The number: a median over rounds where it is a ratio of times.
        peer: What it is compared with, in the same run.
        unit: Of the value; "x" is times the peer.
        low: First quartile over the rounds.
        high: Third quartile.
        goal: What the value should be at most; None if there is no goal.
        milliseconds: Median time of one call, to place the ratio; it depends on the machine.
        memory_mib: Peak memory of one call, in MiB.
        note: Anything else, in words.
    """

    name: str
    value: float
    peer: str
    unit: str = "x"
    low: float | None = None
    high: float | None = None
    goal: float | None = None
    milliseconds: float | None = None
    memory_mib: float | None = None
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        """Whether the goal is reached; None without one."""
        return None if self.goal is None else self.value <= self.goal
