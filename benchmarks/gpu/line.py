"""One line of a part: what is measured, and what it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

Figures = Mapping[str, float | str]
"""What was measured, by column of the table."""


@dataclass(frozen=True)
class Line:
    """Something to measure.

    Attributes:
        name: What it is, unique in its part.
        measure: Does it. Whatever it raises is noted, and the next line goes on in a new process.
        needs: Packages without which it is passed over.
        not_here: Why it is passed over in any case; empty if it is not.
    """

    name: str
    measure: Callable[[], Figures]
    needs: tuple[str, ...] = ()
    not_here: str = ""

    @property
    def obstacle(self) -> str:
        """Why the line is passed over; empty if it can be measured."""
        absent = [package for package in self.needs if find_spec(package) is None]
        return f"not installed: {', '.join(absent)}" if absent else self.not_here
