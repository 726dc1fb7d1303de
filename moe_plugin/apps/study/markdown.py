"""Markdown tables of runs, with the mean and standard deviation over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev


def head(*titles: str) -> str:
    """Return the first two lines of a table."""
    return row(*titles) + "\n" + "|---" * len(titles) + "|"


def row(*cells: str) -> str:
    """Return a line of a table."""
    return "| " + " | ".join(cells) + " |"


def spread(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """Return mean and standard deviation as text; the mean alone if there is one value.

    Args:
        values: One per seed.
        digits: Digits after the point.
        sign: "+" writes it before positive numbers too.
    """
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.{digits}f}{deviation}"
