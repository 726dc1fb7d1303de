"""The figures of a run, by part and line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Results:
    """Looks figures up in what `gpu.json` holds."""

    def __init__(self, result: Mapping[str, Any] | None) -> None:
        """Take a run; None is one that found nothing."""
        self._lines = {
            (part["part"], line["name"]): line.get("figures", {})
            for part in (result or {"parts": []})["parts"]
            for line in part["lines"]
        }

    def get(self, part: str, line: str, column: str) -> float | None:
        """Return a figure; None if it is not there.

        Args:
            part: Its part.
            line: The name of its line.
            column: Its own name.
        """
        return self._lines.get((part, line), {}).get(column)

    def ratio(self, part: str, line: str, other: str, column: str = "ms") -> float | None:
        """Return a figure over the same of another line; None if either is not there.

        Args:
            part: Of both.
            line: The name of the one.
            other: That of the other.
            column: The figure's name.
        """
        one, two = self.get(part, line, column), self.get(part, other, column)
        return None if one is None or two is None else one / two

    def names(self, part: str) -> list[str]:
        """Return the names of the lines of a part that were measured."""
        return [name for (its, name), figures in self._lines.items() if its == part and figures]
